"""One function per command: settings in, result out."""
