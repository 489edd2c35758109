"""The exception with which a test ends a run in the middle."""


class Cut(BaseException):
    """An exception in place of a kill: no code handles it."""
