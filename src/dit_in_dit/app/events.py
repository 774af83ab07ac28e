"""Events of the page: refusals become a message beside the field, and heavy work waits for its turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from dit_in_dit.app.markup import note, refusal
from dit_in_dit.config.errors import UserError, hide_passwords, one_line

TURN: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1}  # one computation at a time, for everybody
QUIET: dict[str, Any] = {"show_progress": "hidden"}
Updates = dict[Any, Any]


def guarded(
    message: Any, handler: Callable[..., Iterator[Updates]], *, clear: bool = True
) -> Callable[..., Iterator[Updates]]:
    """The handler, a generator of updates by component. A UserError becomes the text of the component `message`; so
    does any other error, which is logged too: the page stays alive.

    Args:
        clear: false: an earlier message stays. For events that no user started.
    """

    @wraps(handler)
    def safe(*values: Any) -> Iterator[Updates]:
        try:
            if clear:
                yield {message: ""}
            yield from handler(*values)
        except UserError as error:
            yield {message: refusal(one_line(hide_passwords(str(error))))}
        except (OSError, MemoryError) as error:
            yield {message: refusal(one_line(str(error) or "not enough memory"))}
        except Exception as error:
            logging.getLogger("dit_in_dit.app").exception("the page's event failed")
            yield {message: refusal(f"unexpected {type(error).__name__}: the terminal of dit-in-dit app says more")}

    return safe


@dataclass
class StopFlag:
    """Whether a session asked its work to stop. Each session has its own copy, as a state of the page."""

    asked: bool = False


def stoppable(message: Any, handler: Callable[..., Iterator[Updates]]) -> Callable[..., Iterator[Updates]]:
    """As `guarded`, for a handler whose first value is the session's StopFlag: it ends at its next update."""

    def ended(flag: StopFlag, *values: Any) -> Iterator[Updates]:
        for updates in handler(*values):
            if flag.asked:
                yield {message: note("Stopped.")}
                return
            yield updates

    ended.__name__ = handler.__name__  # of the API; with `wraps`, gradio would count the handler's parameters
    return guarded(message, ended)


def connect_work(
    triggers: list[Any], stop: Any, flag: Any, message: Any, handler: Callable[..., Iterator[Updates]], **event: Any
) -> None:
    """Let triggers start long work in its turn, and a button stop it, in the queue too.

    Args:
        triggers: events of the page, such as `button.click`.
        stop: the button.
        flag: the state with the session's StopFlag.
        event: `inputs` and `outputs` of the handler; `api_name`.
    """
    work = stoppable(message, handler)
    event = {**event, "inputs": [flag, *event["inputs"]], "outputs": [*event["outputs"], message]}
    for trigger in triggers:
        cleared = trigger(_clear, flag, None, queue=False, **QUIET)
        cleared.then(work, **event, **QUIET, **TURN)
    stop.click(_ask, flag, None, queue=False, **QUIET)


def _clear(flag: StopFlag) -> None:
    flag.asked = False


def _ask(flag: StopFlag) -> None:
    flag.asked = True
