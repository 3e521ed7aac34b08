"""The web page for reviewing proposed masks."""
