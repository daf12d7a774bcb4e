"""The one exception for input that dpfl refuses."""


class InputError(ValueError):
    """Input that dpfl refuses before any training starts.

    The message is one sentence for a person: what was wrong, what was expected and what to do.
    The command line prints it and exits with code 2.
    """

    ag_pass_through = True  # TensorFlow's autograph wraps other exceptions that end the tracing of a graph.
