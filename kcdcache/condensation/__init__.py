"""From the value estimate to the condensed set; free of torch."""
