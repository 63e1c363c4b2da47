"""
Conversions of a checkpoint to another form, one module each.

Each conversion writes to a temporary folder, loads the result, compares it with its source, and only then replaces the
output folder. All of them return a [`Report`].
"""
