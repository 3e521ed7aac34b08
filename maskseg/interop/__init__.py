"""Other frameworks' weights -> ours."""
