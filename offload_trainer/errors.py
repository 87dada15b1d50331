"""The one exception that means "the user can fix this": shown as a single line, exit code 2."""


class UserError(ValueError):
    """A mistake in the config, the data or the model: says what, where and what to do, in one line."""


class NotFinite(UserError):
    """Training has left the numbers. All ranks raise it, together."""
