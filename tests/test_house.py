"""The house in one page: its picture and its list are those of the package as it is."""

from docs import house


def test_the_picture_is_of_today():
    assert house.PICTURE.read_text("utf-8") == house.picture(), "run python -m docs.house"


def test_the_list_is_of_today():
    text = house.PAGE.read_text("utf-8")
    assert house.page(text) == text, "run python -m docs.house"
    assert "- `estimators/`: Estimators of the hypergradient" in text


def test_an_arrow_that_others_imply_is_not_drawn():
    graph = {"run": {"linear", "tree"}, "linear": {"tree"}, "tree": set(), "rng": set()}
    assert house.arrows(graph) == [("linear", "tree"), ("run", "linear")]
    graph["linear"] = set()  # control: it is drawn where nothing implies it
    assert house.arrows(graph) == [("run", "linear"), ("run", "tree")]


def test_a_new_import_or_folder_puts_both_out_of_date(monkeypatch):
    found = house.rooms(house.files())
    monkeypatch.setattr(house, "rooms", lambda graph: {**found, "tree": found["tree"] | {"rng"}})
    assert house.PICTURE.read_text("utf-8") != house.picture()
    monkeypatch.setattr(house, "about", lambda name: "Another first line.")
    text = house.PAGE.read_text("utf-8")
    assert house.page(text) != text
