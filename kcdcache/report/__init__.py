"""From finished runs to one HTML file."""
