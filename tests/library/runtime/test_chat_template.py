"""Chat templates of others: what they may take, and the error if they take more."""

import gc
import resource
import signal
import threading
import time

import pytest
from chats import make_tokenizer
from hostile_templates import TEMPLATES

from lordjax.runtime import chat_template
from lordjax.runtime.chat_template import limited, render

MESSAGES = [{"role": "user", "content": "hello"}]
ENDLESS = ("loops", "loops that catch errors", "number", "number by constants", "many calls")


def rendered(template, messages=MESSAGES):
    return render(make_tokenizer(template), messages, "MODEL", "cannot be used")


def test_an_honest_template_is_rendered_as_before():
    tokenizer, before = make_tokenizer(), resource.getrlimit(resource.RLIMIT_AS)
    messages = [{"role": "user", "content": "a" * 2**23}]
    text = render(tokenizer, messages, "MODEL", "cannot be used", add_generation_prompt=True)
    assert text == f"<|user|>{'a' * 2**23}<|end|>\n<|assistant|>"
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.quick("product", "doubling", "justified", "deep", "long", *ENDLESS[:3])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_too_much_is_an_error(name, monkeypatch):
    if name in ENDLESS:
        monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    start = time.monotonic()
    message = r"^MODEL: cannot be used \(.+\); correct it$"
    with pytest.raises(ValueError, match=message) as caught:
        rendered(TEMPLATES[name])
    assert time.monotonic() - start < 10
    assert ("within 0.3 s" in str(caught.value)) == (name in ENDLESS)


def test_limits_end_with_the_block():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"), limited(0.05, 10**8):
        while True:
            pass
    time.sleep(0.1)
    with pytest.raises(MemoryError), limited(5, 10**7):
        bytearray(10**8)
    assert len(bytearray(10**8)) == 10**8
    assert signal.getsignal(signal.SIGALRM) is before


def test_no_error_is_lost_while_garbage_is_collected():
    """Python drops what is raised in a callback of the collector; so it does not run here."""
    called = []

    def note(phase, _):
        called.append(phase)

    gc.callbacks.append(note)
    try:
        with limited(5, 10**9):
            called.clear()
            kept = [[] for _ in range(10 * gc.get_threshold()[0])]
            inside = list(called)
        kept += [[] for _ in range(10 * gc.get_threshold()[0])]
    finally:
        gc.callbacks.remove(note)
    assert not inside
    assert called  # it runs again


def test_other_threads_have_no_time_limit():
    """Only the main thread gets signals; the template works in others, too."""
    found = []
    thread = threading.Thread(target=lambda: found.append(rendered("{{ messages[0].content }}")))
    thread.start()
    thread.join()
    assert found == ["hello"]
