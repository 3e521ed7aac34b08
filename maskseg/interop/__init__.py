"""Conversion of weights between other frameworks and this one."""
