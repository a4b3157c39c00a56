"""The chat in the terminal, against a server over a socket."""

from __future__ import annotations

import builtins
import io
import time
from collections.abc import Callable, Iterator

import pytest
from openai_server import OpenAiServer, running

from clif.clients.chat import Chat, ChatFailed, Terminal, printable
from clif.clients.endpoint import KEY_VARIABLE, Endpoint
from clif.clients.stream import Events, StreamError, chunk_of
from clif.errors import InputError

ANSWER = "one two three four"


@pytest.fixture(scope="module")
def shared() -> Iterator[OpenAiServer]:
    with running(OpenAiServer()) as server:
        yield server


@pytest.fixture
def server(shared: OpenAiServer) -> OpenAiServer:
    shared.key = None
    shared.seen.clear()
    return shared


def chat(server: OpenAiServer, model: str = "good", **more: str) -> Chat:
    return Chat(Endpoint.of(server.url), model, **more)


def piped(server: OpenAiServer, lines: str, model: str = "good") -> str:
    target = io.StringIO()
    Terminal(chat(server, model), io.StringIO(lines), target).run()
    return target.getvalue()


class Typed:
    """A terminal: each line is typed at the prompt; KeyboardInterrupt is Ctrl-C there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
        left = [*lines, EOFError]

        def ask(prompt: str) -> str:
            line = left.pop(0)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", ask)
        self.shown = io.StringIO()

    def run(self, chat: Chat, on_write: Callable[[str], None] = lambda _: None) -> str:
        class Terminals(io.StringIO):
            def isatty(self) -> bool:
                return True

        write = self.shown.write

        def noticed(text: str) -> int:
            count = write(text)
            on_write(text)
            return count

        self.shown.write = noticed  # type: ignore[method-assign]
        Terminal(chat, Terminals(), self.shown).run()
        return self.shown.getvalue()


@pytest.mark.parametrize("model", ["good", "split", "no-usage"])
def test_lines_that_are_piped_in_are_answered_with_nothing_else(server, model):
    assert piped(server, "hello\n\nagain", model) == f"{ANSWER}\n{ANSWER}\n"
    roles = [message["role"] for message in server.seen[1]["messages"]]
    assert roles == ["user", "assistant", "user"], "the second question comes with the first and its answer"


def test_reset_forgets_all_but_the_systems_message_and_model_changes_the_model(server, monkeypatch):
    asked = chat(server, system="be brief")
    shown = Typed(monkeypatch, "hello", "/reset", "/model other", "hi", "/model", "/what", "/quit").run(asked)
    assert [body["model"] for body in server.seen] == ["good", "other"]
    assert server.seen[1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert "* other" in shown and "  good" in shown and "/reset        forget" in shown


def test_ctrl_c_ends_the_answer_and_not_the_chat(server, monkeypatch):
    """What was answered until then stays in the conversation, and the server learns that nobody listens any more."""

    def interrupt(text: str) -> None:
        if text == "one" and asked.model == "stalls":
            asked.model = "good"
            raise KeyboardInterrupt

    asked, gone = chat(server, "stalls"), server.gone
    shown = Typed(monkeypatch, "hello", KeyboardInterrupt, "go on").run(asked, interrupt)
    assert "one [ended]" in shown and ANSWER in shown
    assert [m["content"] for m in server.seen[1]["messages"]] == ["hello", "one", "go on"]
    while server.gone == gone:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("http503", r"come back later \(HTTP 503\)"),
        ("breaks", "does not answer"),
        ("cut", "broken the connection off"),
        ("error-event", "the engine is gone"),
        ("garbage", "no chat completion"),
    ],
)
def test_an_error_ends_a_pipe_with_its_message_and_a_chat_goes_on(server, monkeypatch, model, says):
    with pytest.raises(ChatFailed, match=says):
        piped(server, "hello\n", model)
    asked = chat(server, model)
    shown = Typed(monkeypatch, "hello", "/model good", "hello").run(asked)
    assert "error: " in shown and shown.rstrip().endswith(ANSWER)


def test_a_question_that_was_not_answered_at_all_is_forgotten(server):
    asked = chat(server, "http503")
    with pytest.raises(ChatFailed, match="come back later"):
        list(asked.ask("hello"))
    assert asked.history == []


def test_a_key_is_sent_from_the_option_or_the_environment(server, monkeypatch):
    server.key = "secret"
    with pytest.raises(InputError, match=r"refuses: no such key \(HTTP 401\)"):
        Endpoint.of(server.url).choose_model(None)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert Endpoint.of(server.url).choose_model(None) == "good"
    with pytest.raises(InputError, match="no such key"):
        Endpoint.of(server.url, "wrong").models()


def test_an_address_that_is_no_server_is_said():
    assert Endpoint.of("localhost:8000").url == Endpoint.of("http://localhost:8000/v1/").url
    with pytest.raises(InputError, match=r"no URL of a server: write http://HOST:PORT"):
        Endpoint.of("ftp://x")
    with pytest.raises(InputError, match=r"does not answer .*start a server, or name another"):
        Endpoint.of("127.0.0.1:1").models()


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\u202eb\r\n\tc") == "a\ufffd[2J\ufffdb\ufffd\n\tc"


def test_events_are_cut_alike_however_their_bytes_come():
    raw = b": comment\n\ndata: {}\r\n\r\nevent: x\ndata: a\ndata:b\n\nid: 1\n\ndata: [DONE]\n\n"
    for size in (1, 2, 7, len(raw)):
        events = Events()
        found = [data for at in range(0, len(raw), size) for data in events.feed(raw[at : at + size])]
        assert found == [b"{}", b"a\nb", b"[DONE]"], size


def test_an_event_that_is_no_completion_is_an_error():
    assert chunk_of(b'{"choices":[{"delta":{"reasoning_content":"hm","content":null}}]}').text == "hm"
    with pytest.raises(StreamError, match="no chat completion"):
        chunk_of(b'{"choices": 3}')
