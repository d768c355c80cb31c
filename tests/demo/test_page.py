"""The page as a program meets it: requests made by hand, files that nobody may have."""

import threading
import urllib.error
import urllib.request

import pytest

FIRST = "first, step 7"
GOOD = [FIRST, 2, 2, 0, "euler", 3, 2.0, "as configured", 1.0, 0.5]


def changed(**values):
    names = [
        "name",
        "what",
        "count",
        "seed",
        "sampler",
        "steps",
        "guidance",
        "rule",
        "capacity",
        "threshold",
    ]
    return [values.get(name, value) for name, value in zip(names, GOOD, strict=True)]


def test_a_request_draws(server):
    event, data = server.post("generate", *GOOD)
    assert event == "complete"
    assert data[0].count("dm-map") == 2
    assert "C_infer" in data[2]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"steps": 10**9}, "1000000000"),
        ({"steps": 0}, "steps"),
        ({"count": 0}, "images"),
        ({"count": 17}, "17"),
        ({"count": 1.5}, "images: 1.5 is not allowed; allowed: a whole number of 1 ... 16"),
        ({"guidance": -1}, "-1"),
        ({"guidance": "NaN"}, "guidance: 'NaN' is not allowed"),
        ({"guidance": float("nan")}, "guidance: nan is not allowed"),
        ({"guidance": None}, "guidance: None is not allowed; allowed: a number of 0 ... 20"),
        ({"name": "../../etc/passwd"}, "passwd"),
        ({"what": 3}, "3"),
        ({"what": "dog"}, "dog"),
        ({"sampler": "ddim"}, "ddim"),
        ({"rule": "threshold"}, "threshold"),
        ({"rule": "fixed", "threshold": 1.5}, "1.5"),
        ({"seed": -3}, "-3"),
        ({"seed": 1e30}, "seed"),
        ({"seed": [1, 2]}, "seed: [1, 2] is not allowed"),
        ({"what": {"path": "/etc/passwd"}}, "class: {'path': '/etc/passwd'} is not allowed"),
        ({"name": "x" * 5000}, "checkpoint: 'xxx"),
    ],
    ids=str,
)
def test_a_wrong_request_gets_one_line(values, wanted, server, capfd):
    event, data = server.post("generate", *changed(**values))
    assert event == "error"
    line = (data or {}).get("error") or ""
    assert "\n" not in line
    assert "Traceback" not in str(data)
    assert "Traceback" not in capfd.readouterr().err
    assert wanted in line
    assert len(line) < 300


def test_too_few_inputs_are_refused_without_a_word_of_the_inside(server):
    event, data = server.post("generate", *GOOD[:4])
    assert event == "error"
    assert "Traceback" not in str(data)


def test_classes_and_comparisons_by_hand(server):
    settings = GOOD[3:]
    event, data = server.post("classes", FIRST, [0, 2], 1, *settings)
    assert (event, data[1].count("dm-row")) == ("complete", 2)
    assert server.post("classes", FIRST, [0, 7], 1, *settings)[1]["error"].startswith("class: 7")
    event, data = server.post("compare", "all checkpoints", *GOOD, "topk", 2, 0.5)
    assert (event, data[1].count("dm-section")) == ("complete", 2)
    error = server.post("compare", "../x", *GOOD, "topk", 2, 0.5)[1]["error"]
    assert error.startswith("comparison: '../x' is not allowed")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "demo/app.py", "../../etc/passwd", "/proc/self/environ"]
)
def test_no_file_of_the_machine_is_served(path, server):
    for route in ("file=", "stream/", ""):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/gradio_api/{route}{path}", timeout=10)
        assert refused.value.code in (403, 404, 405)


def test_nothing_is_taken_in(server):
    line = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc'
    line += b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{server.url}/gradio_api/upload", line, kind)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 413


def test_the_page_names_no_other_machine(server):
    with urllib.request.urlopen(server.url, timeout=10) as reply:
        page = reply.read().decode()
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page
    assert '"analytics_enabled":false' in page.replace(" ", "").replace("\\", "")


def test_two_clients_at_once_get_their_own(server):
    found = {}

    def ask(label, seed):
        found[label, seed] = server.post("generate", *changed(what=label, seed=seed))[1]

    asked = [(0, 1), (2, 5), (0, 5)]
    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for label, seed in asked:
        assert (
            found[label, seed][0] == server.post("generate", *changed(what=label, seed=seed))[1][0]
        )
    assert len({data[0] for data in found.values()}) == 3
