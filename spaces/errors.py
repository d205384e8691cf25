"""What goes wrong, in a sentence for whoever asked."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr


NOT_ANSWERED = "Not answered"  # title of what the page says in an answer's place


@contextmanager
def explained() -> Iterator[None]:
    """Whatever goes wrong, as one sentence to the visitor; of what is our own fault the place goes to the log."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(str(error), duration=None, title=NOT_ANSWERED, print_exception=False) from None
    except Exception as error:
        # The text of an error may hold what a visitor wrote
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(f"{type(error).__name__} at {frame.filename}:{frame.lineno}", file=sys.stderr, flush=True)
        sentence = (
            f"Something failed here ({type(error).__name__}). Try again, with a smaller image or a new question."
        )
        raise gr.Error(sentence, duration=None, title=NOT_ANSWERED, print_exception=False) from None
