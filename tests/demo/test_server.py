"""The address of the page, its texts, and what the command refuses; without a browser, and nearly without Gradio."""

import contextlib
import gc
import http.client
import re
import socket
import sys
import threading
import warnings
from types import ModuleType

import pytest
from command import run

import convmixer
from convmixer.demo import BackendTime, Classifier, serve
from convmixer.demo import server as module
from convmixer.demo.text import bars_by_label, describe, table_of_times
from convmixer.errors import ArgumentError, DependencyError


@pytest.fixture
def gradio(monkeypatch):
    """An empty module of that name, for tests of what happens before Gradio is used."""
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))


@pytest.mark.usefixtures("gradio")
def test_a_port_that_is_taken():
    with module.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        expected = (
            f"cannot listen at host='127.0.0.1', port={port}: another program uses this port; give another port, or 0 "
            "for any that is free"
        )
        with pytest.raises(ArgumentError) as raised:
            serve(port=port)
        assert str(raised.value) == expected
        assert run("demo", "--port", port, status=2).stderr.split() == f"error: {expected}".split()


def test_addresses():
    with module.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    for host in ("203.0.113.1", "no host"):
        with pytest.raises(ArgumentError, match=rf"cannot listen at host='{host}', port=0: .*; the usual ones are"):
            module.listen(host, 0)
    with pytest.raises(ArgumentError, match="port='8000': give a whole number of at least 0"):
        module.listen("127.0.0.1", "8000")
    with contextlib.suppress(ArgumentError), module.listen("::1", 0) as listener:  # not every machine has it
        assert listener.family == socket.AF_INET6


@pytest.mark.usefixtures("gradio")
@pytest.mark.parametrize(("host", "more"), [("127.0.0.1", ""), ("0.0.0.0", "other machines may reach it; ")])
def test_the_line_says_who_can_reach_it(monkeypatch, host, more):
    monkeypatch.setattr(module, "create_app", lambda models, **_: models)
    monkeypatch.setattr(module, "server", lambda _: type("Server", (), {"run": lambda self, sockets: None})())
    said = []
    serve(["any"], host=host, port=0, report=said.append)
    (line,) = said
    assert re.fullmatch(rf"http://{host}:\d+ \({more}Ctrl-C ends it\)", line)


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    text = r"the page needs gradio, which is missing: pip install 'convmixer\[demo\]'"
    with pytest.raises(DependencyError, match=text):
        serve()
    with pytest.raises(DependencyError, match=text):
        module.create_app()


@pytest.mark.usefixtures("gradio")
def test_a_typo_ends_the_command_before_it_serves():
    said = run("demo", "convmixer_265_8", "--port", 0, status=2)
    assert not said.stdout
    assert "no folder or file 'convmixer_265_8', and no model: unknown model" in said.stderr
    assert "did you mean convmixer_256_8" in " ".join(said.stderr.split())


def test_no_event_loop_is_left_open():
    pytest.importorskip("gradio")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.create_app(["convmixer_128_8_ks7_p2"], device="cpu", backends=())
        gc.collect()
    assert not [str(w.message) for w in caught if w.category is ResourceWarning and "loop" in str(w.message)]


def test_classes_of_one_name_have_bars_of_their_own():
    found = bars_by_label([("crane", 0.5), ("crane (2)", 0.2), ("crane", 0.125), ("heron", 0.1)])
    assert found == {"crane": 0.5, "crane (2)": 0.2, "crane (3)": 0.125, "heron": 0.1}


def test_description_of_a_model():
    few, many = (
        describe(Classifier(convmixer.create_model(name, device="cpu", **sizes), backends=()))
        for name, sizes in (("convmixer_256_8", {"num_classes": 1}), ("convmixer_512_12", {"dim": 8}))
    )
    assert few == (
        "0.59 M parameters. It sees 32x32 pixels and knows 2 classes: class 0, class 1. It answers with one of them, "
        "whatever the picture shows."
    )
    assert many == (
        "0.02 M parameters. It sees 224x224 pixels and knows 1,000 classes. It answers with one of them, whatever the "
        "picture shows."
    )


def test_table_of_times():
    rows = [BackendTime("native", 1.234), BackendTime("openvino", None, "<b>a|b\n  c"), BackendTime("eager", 5.0)]
    head = "Time for one image, `flowers`\n\n| backend | milliseconds | |\n| --- | --: | --- |\n"
    assert table_of_times("flowers", rows, []) == (
        f"{head}| native | 1.23 | fastest |\n| openvino | | &lt;b&gt;a/b c |\n| eager | 5.00 |  |"
    )
    assert table_of_times("flowers", rows[:1], ["openvino", "eager"]) == (
        f"{head}| native | 1.23 |  |\n| openvino | | being timed |\n| eager | | waiting |"
    )


def test_browsers_are_told_to_ask_no_other_host():
    """A real server sends the policy with the answer of a minimal application."""
    uvicorn = pytest.importorskip("uvicorn")

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    server = module.server(module._OnlyOwnHost(app))
    assert isinstance(server, uvicorn.Server)
    server.config.lifespan = "off"
    with module.listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            connection = http.client.HTTPConnection(*listener.getsockname(), timeout=60)
            connection.request("GET", "/")
            policy = connection.getresponse().headers["content-security-policy"]
            connection.close()
        finally:
            server.should_exit = True
            thread.join()
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert "*" not in policy
