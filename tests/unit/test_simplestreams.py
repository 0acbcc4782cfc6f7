"""The simplestreams documents of image servers: what is found in them, and what hostile ones cannot do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest, NotFound, Unsupported, VzfleetError
from controller.images.simplestreams import (
    Catalogue,
    RemoteImage,
    check_path,
    join,
    read_index,
    read_products,
    url_of,
)
from controller.images.wishes import Wish, find
from tests.helpers.streams import SplitImage, Streams, archive, metadata_of, root, split_image

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


def served(streams: Streams) -> Catalogue:
    content = streams.content("streams/v1/images.json")
    assert content is not None
    return read_products(content)


def ubuntu(streams: Streams) -> dict[str, SplitImage]:
    """jammy in two versions, two architectures and two variants."""
    made: dict[str, SplitImage] = {}
    for arch in ("amd64", "arm64"):
        for variant in ("default", "cloud"):
            names = ["ubuntu/jammy", "ubuntu/22.04"]
            aliases = ",".join([f"{name}/{variant}" for name in names] + (names if variant == "default" else []))
            for serial in ("20260102_07:42", "20260101_07:42"):
                image = split_image(f"{arch} {variant} {serial}")
                made[f"{arch} {variant} {serial}"] = image
                streams.add(f"ubuntu:jammy:{arch}:{variant}", serial, image, aliases=aliases, version="22.04")
    return made


def test_an_index_names_its_files_of_images() -> None:
    content = {
        "format": "index:1.0",
        "index": {
            "a": {"datatype": "image-downloads", "path": "streams/v1/a.json", "format": "products:1.0"},
            "b": {"datatype": "image-ids", "path": "streams/v1/b.json"},
            "c": {"datatype": "image-downloads", "path": "streams/v1/a.json", "products": ["x"]},
        },
        "updated": "today",
    }
    assert read_index(json.dumps(content).encode()) == ["streams/v1/a.json"]


@pytest.mark.parametrize(
    ("alias", "architecture", "found"),
    [
        ("ubuntu/22.04", "x86_64", "amd64 default"),
        ("ubuntu/jammy", "aarch64", "arm64 default"),
        ("ubuntu/22.04/cloud", "x86_64", "amd64 cloud"),
        ("ubuntu/22.04/arm64", "aarch64", "arm64 default"),
        ("ubuntu/22.04/aarch64", "x86_64", "arm64 default"),
        ("ubuntu/jammy/cloud/amd64", "x86_64", "amd64 cloud"),
        ("ubuntu/jammy/default", "x86_64", "amd64 default"),
    ],
)
def test_an_alias_means_the_newest_version_of_its_architecture(alias: str, architecture: str, found: str) -> None:
    streams = Streams()
    made = ubuntu(streams)
    image = find(served(streams), Wish(alias=alias, architecture=architecture))
    assert image.fingerprint == made[f"{found} 20260102_07:42"].fingerprint
    assert image.serial == "20260102_07:42" and len(image.files) == 2


@pytest.mark.parametrize(
    ("properties", "found"),
    [
        ({"os": "ubuntu", "release": "jammy"}, "amd64 default"),
        ({"os": "Ubuntu", "release": "22.04"}, "amd64 default"),
        ({"os": "ubuntu", "release": "jammy", "variant": "cloud"}, "amd64 cloud"),
        ({"os": "ubuntu", "architecture": "arm64"}, "arm64 default"),
        ({"os": "ubuntu", "architecture": "aarch64", "variant": "cloud"}, "arm64 cloud"),
    ],
)
def test_properties_mean_the_default_variant_unless_they_say(properties: dict[str, str], found: str) -> None:
    streams = Streams()
    made = ubuntu(streams)
    image = find(served(streams), Wish(properties=properties, architecture="x86_64"))
    assert image.fingerprint == made[f"{found} 20260102_07:42"].fingerprint


def test_a_fingerprint_means_any_version() -> None:
    streams = Streams()
    for image in ubuntu(streams).values():
        assert find(served(streams), Wish(fingerprint=image.fingerprint[:20])).fingerprint == image.fingerprint


@pytest.mark.parametrize(
    "wish",
    [
        Wish(alias="ubuntu/24.04", architecture="x86_64"),
        Wish(alias="ubuntu/22.04", architecture="riscv64"),
        Wish(alias="ubuntu/22.04/s390x", architecture="x86_64"),
        Wish(alias="ubuntu", architecture="x86_64"),
        Wish(fingerprint="0" * 64),
        Wish(properties={"os": "ubuntu", "flavour": "sweet"}),
        Wish(properties={"os": "ubuntu", "release": "noble"}),
    ],
)
def test_what_a_server_does_not_have_is_named(wish: Wish) -> None:
    streams = Streams()
    ubuntu(streams)
    with pytest.raises(NotFound, match="no image for"):
        find(served(streams), wish)


def test_one_file_with_both_parts_will_do() -> None:
    streams = Streams()
    content = archive({"metadata.yaml": metadata_of("tiny", "1"), **root("x", "rootfs/")}, "gz")
    fingerprint = streams.add_unified("tiny:1:amd64:default", "1", content)
    image = find(served(streams), Wish(alias="tiny/1", architecture="x86_64"))
    assert (image.fingerprint, len(image.files), image.size) == (fingerprint, 1, len(content))


def test_what_is_offered_as_squashfs_only_is_refused_with_the_reason() -> None:
    streams = Streams()
    streams.add("tiny:1:amd64:default", "1", split_image("x"))
    items = streams.products["tiny:1:amd64:default"]["versions"]["1"]["items"]
    items["root.squashfs"] = {**items.pop("root.tar.xz"), "ftype": "squashfs"}
    for alias in ("tiny/1", "tiny/1/amd64"):
        with pytest.raises(Unsupported, match=r"only as lxd\.tar\.xz, squashfs; tar archives are needed"):
            find(served(streams), Wish(alias=alias, architecture="x86_64"))


@pytest.mark.parametrize(
    ("item", "change"),
    [
        ("root.tar.xz", {"path": "../../etc/passwd"}),
        ("root.tar.xz", {"path": "/etc/passwd"}),
        ("root.tar.xz", {"path": "https://evil/x"}),
        ("root.tar.xz", {"path": "//evil/x"}),
        ("root.tar.xz", {"path": "a?b"}),
        ("root.tar.xz", {"path": "a%2e%2e/b"}),
        ("root.tar.xz", {"path": ""}),
        ("root.tar.xz", {"size": 0}),
        ("root.tar.xz", {"sha256": "x" * 64}),
        ("lxd.tar.xz", {"sha256": "ABCD"}),
        ("lxd.tar.xz", {"combined_rootxz_sha256": ""}),
        ("lxd.tar.xz", {"combined_rootxz_sha256": "../" * 21 + "x"}),
    ],
)
def test_a_version_with_a_bad_item_is_passed_over(item: str, change: dict[str, Any]) -> None:
    streams = Streams()
    for serial in ("1", "2"):
        streams.add("tiny:1:amd64:default", serial, split_image(serial))
    streams.products["tiny:1:amd64:default"]["versions"]["2"]["items"][item] |= change
    assert find(served(streams), Wish(alias="tiny/1")).serial == "1"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"format": "products:2.0"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": "products:1.0", "products": []}',
        b'{"format": "products:1.0", "products": {"a": {"aliases": 1}}}',
        b'{"format": "products:1.0", "products": {"a": {"versions": {"1": {"items": {"x": {"size": -1}}}}}}}',
        json.dumps({"format": "products:1.0", "products": {"a": {"os": "x" * 2000}}}).encode(),
        json.dumps({"format": "products:1.0", "products": {str(n): {} for n in range(50_001)}}).encode(),
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_documents_that_are_none_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidRequest):
        read_products(content)


def test_an_index_cannot_lead_elsewhere() -> None:
    for path in (
        "../x",
        "/x",
        "https://evil/x",
        "a/../../x",
        "a/./b",
        "",
        "a//b",
        "a b",
        "a\nb",
        "x" * 5000,
        "a/" * 20,
    ):
        stream = {"datatype": "image-downloads", "path": path}
        with pytest.raises(InvalidRequest):
            read_index(json.dumps({"format": "index:1.0", "index": {"a": stream}}).encode())
    many = {str(n): {"datatype": "image-downloads", "path": f"{n}.json"} for n in range(17)}
    with pytest.raises(InvalidRequest, match="too many"):
        read_index(json.dumps({"format": "index:1.0", "index": many}).encode())


@settings(max_examples=300)
@given(st.text(max_size=60) | st.from_regex(r"[./%a-z:?#\\-]{1,30}", fullmatch=True))
def test_a_path_that_is_followed_stays_below_its_server(path: str) -> None:
    try:
        checked = check_path(path)
    except InvalidRequest:
        return
    url = url_of("https://host/base/", checked)
    assert url.startswith("https://host/base/") and "/../" not in f"{url}/" and "/./" not in f"{url}/"
    assert "?" not in url and "#" not in url and "//" not in url.removeprefix("https://")


@settings(max_examples=300)
@given(JSON)
def test_any_json_is_read_or_refused(value: Any) -> None:
    for content in (
        value,
        {"format": "products:1.0", "products": value},
        {"format": "products:1.0", "products": {"p": value}},
        {"format": "products:1.0", "products": {"p": {"aliases": "a", "versions": {"1": {"items": value}}}}},
        {"format": "products:1.0", "products": {"p": {"aliases": "a", "versions": {"1": {"items": {"i": value}}}}}},
        {"format": "index:1.0", "index": {"i": value}},
    ):
        encoded = json.dumps(content).encode()
        for read in (read_products, read_index):
            try:
                found = read(encoded)
            except VzfleetError:
                continue
            images = found.images if isinstance(found, Catalogue) else ()
            assert all(isinstance(image, RemoteImage) for image in images)


def test_texts_that_would_break_a_line_are_left_out() -> None:
    streams = Streams()
    streams.add("tiny:1:amd64:default", "1", split_image("x"), aliases="tiny/1,with space,y\nz,", label="a\nb")
    streams.products["tiny:1:amd64:default"]["release"] = "1\nlxc.hook"
    image = find(served(streams), Wish(alias="tiny/1"))
    assert image.aliases == ("tiny/1",)
    assert not any("\n" in value for value in image.properties.values())


def test_several_files_of_products_are_one_catalogue() -> None:
    parts = []
    for number in ("1", "2"):
        streams = Streams()
        streams.add(f"tiny:{number}:amd64:default", "1", split_image(number))
        parts.append(served(streams))
    for number in ("1", "2"):
        assert find(join(parts), Wish(alias=f"tiny/{number}")).properties["release"] == number
