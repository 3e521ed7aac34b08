"""The web page on which proposed masks are reviewed."""
