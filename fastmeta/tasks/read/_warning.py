"""What is said of data that was read, but not all of it as it stood."""


class DataWarning(UserWarning):
    """Files that were skipped, cells that were filled, columns that were left out."""
