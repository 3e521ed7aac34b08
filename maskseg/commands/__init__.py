"""One module for each tool, of the tool's name."""
