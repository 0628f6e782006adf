"""The one exception that means "the user's config or data is wrong". Floor 0; imports nothing of ours."""


class InputError(ValueError):
    """A mistake in the config or the data that the user can mend.

    The message is one line: which file, row and column (or which key), what was expected, what was found.
    The command line prints it as it is and exits with code 2; nothing has been trained or overwritten by then.
    """
