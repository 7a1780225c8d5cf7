"""The built-in model understands every sentence that the demo sends and recommends."""

from __future__ import annotations

import json
import re

import pytest

import edgelm
from edgelm.cli.demo import NEXT, PROMPTS

EXPECTED = {
    "play some jazz by Miles Davis on spotify": (
        "PlayMusic",
        {"genre": "jazz", "artist": "Miles Davis", "service": "spotify"},
    ),
    "book a table for four at an italian restaurant in Boston tomorrow": (
        "BookRestaurant",
        {
            "party_size_number": "four",
            "cuisine": "italian",
            "restaurant_type": "restaurant",
            "city": "Boston",
            "timeRange": "tomorrow",
        },
    ),
    "will it rain in Berlin on friday": (
        "GetWeather",
        {"condition_description": "rain", "city": "Berlin", "timeRange": "friday"},
    ),
    "add Adele to my running playlist": (
        "AddToPlaylist",
        {"artist": "Adele", "playlist_owner": "my", "playlist": "running"},
    ),
}


def unique(pairs):
    names = [name for name, _ in pairs]
    assert len(names) == len(set(names)), f"a key twice: {names}"
    return dict(pairs)


@pytest.fixture(scope="module")
def builtin():
    with edgelm.load("builtin", threads=1) as model:
        yield model


def recommended():
    return re.findall(r'ask "(.*?)"', " ".join(arguments for arguments, _ in NEXT))


def test_the_demo_recommends_something():
    assert recommended()


@pytest.mark.parametrize("sentence", [*PROMPTS, *recommended()])
def test_every_sentence_is_understood(builtin, sentence):
    frame = json.loads(builtin.generate(sentence).text, object_pairs_hook=unique)
    assert (frame["intent"], frame["slots"]) == EXPECTED[sentence]
