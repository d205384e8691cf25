"""Errors as sentences for the visitor."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


NOT_ANSWERED = "Not answered"  # title of an error that the page shows instead of an answer


@contextmanager
def explained() -> Iterator[None]:
    """Turn errors into one sentence for the visitor, and log only the line of unexpected errors."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(str(error), duration=None, title=NOT_ANSWERED, print_exception=False) from None
    except Exception as error:
        # The text of the error may contain what a visitor wrote.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} at {frame.filename}:{frame.lineno}", file=sys.stderr, flush=True)
        sentence = (
            f"Something failed here ({type(error).__name__}). Try again, with a smaller image or a new question."
        )
        raise gr.Error(sentence, duration=None, title=NOT_ANSWERED, print_exception=False) from None
