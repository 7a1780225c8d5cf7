"""A board that serves several models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import serving

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.cli import main
from edgelm.errors import EdgelmError
from edgelm.mqtt.service_config import ServeConfig, load_config
from edgelm.mqtt.service_setup import open_service
from edgelm.runtime.memory_plan import PROGRAM_BYTES, plan_memory

PROMPT = "Once upon a time"


@pytest.fixture
def both(config: ServeConfig) -> ServeConfig:
    """Settings of a board with the stories model first and the built-in model second."""
    return dataclasses.replace(config, model=(str(config.model), "builtin"))


def test_a_request_is_answered_by_the_model_it_names(broker: Broker, both: ServeConfig) -> None:
    stories, builtin = (open_bundle(path) for path in both.models)
    expected = {}
    for bundle, prompt in ((stories, PROMPT), (builtin, "play some jazz")):
        with edgelm.load(bundle.path, threads=1) as model:
            expected[bundle.manifest.digest] = model.generate(prompt, max_tokens=12, temperature=0).text
    topic = f"edgelm/{both.board}/generate"
    with serving(both), Client(broker.port, "reply", f"edgelm/{both.board}/+") as client:
        for i, (model, prompt) in enumerate(
            [
                (None, PROMPT),
                ("builtin", "play some jazz"),
                (stories.path.name, PROMPT),
                (builtin.manifest.digest, "play some jazz"),
            ]
        ):
            body = {"id": str(i), "prompt": prompt, "max_tokens": 12, "temperature": 0, "response_topic": "reply"}
            client.publish(topic, json.dumps(body | ({"model": model} if model else {})).encode())
        client.publish(topic, json.dumps({"id": "x", "prompt": "a", "model": "z", "response_topic": "reply"}).encode())

        def finals() -> dict[str, dict]:
            return {each.body["id"]: each.body for each in client.heard if each.topic == "reply"}

        client.wait(lambda _: len(finals()) == 5)
        answers = finals()
        info = next(each.body for each in client.heard if each.topic.endswith("/info"))
    names = [stories.path.name, "builtin"]
    assert [model["name"] for model in info["models"]] == names
    assert [model["digest"] for model in info["models"]] == [stories.manifest.digest, builtin.manifest.digest]
    for key, which in (("0", stories), ("1", builtin), ("2", stories), ("3", builtin)):
        assert answers[key]["text"] == expected[which.manifest.digest]
        assert answers[key]["model"] == ("builtin" if which is builtin else names[0])
    assert answers["x"]["error"]["code"] == "model_not_found"
    assert all(name in answers["x"]["error"]["message"] for name in names)


def test_ask_names_a_model(broker: Broker, both: ServeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "play some jazz", "--broker", broker.url, "--board", both.board, "--json"]
    with serving(both):
        assert main([*arguments, "--model", "builtin"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "builtin"
        assert main([*arguments, "--model", "nothing"]) == 1
        assert "model_not_found" in capsys.readouterr().err


def test_a_cancel_reaches_the_right_model(broker: Broker, both: ServeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(both, monkeypatch, step_s=0.05), Client(broker.port, "reply") as client:
        for model in ("builtin", Path(both.models[0]).name):
            body = {"id": model, "prompt": PROMPT, "model": model, "max_tokens": 90, "ignore_eos": True}
            body["response_topic"] = "reply"
            client.publish(f"edgelm/{both.board}/generate", json.dumps(body).encode())
            client.publish(f"edgelm/{both.board}/cancel", model.encode())
        client.wait(lambda heard: len(heard) == 2)
    assert {each.body["finish_reason"] for each in client.heard} == {"cancelled"}


def test_two_models_of_one_name_are_refused(both: ServeConfig, tmp_path: Path) -> None:
    copy = tmp_path / "builtin"
    shutil.copytree(open_bundle("builtin").path, copy)
    twice = dataclasses.replace(both, model=("builtin", str(copy)))
    with pytest.raises(EdgelmError, match="builtin"), open_service(twice):
        pass


def test_the_memory_limit_applies_to_all_models_together(both: ServeConfig) -> None:
    plans = [
        plan_memory(open_bundle(path).manifest, rows=5, context=64, prefix_cache_bytes=20_000_000)
        for path in both.models
    ]
    together = sum(plan.total for plan in plans) - PROGRAM_BYTES
    small = dataclasses.replace(both, context=64, prefix_cache_mb=20)
    with open_service(dataclasses.replace(small, memory_limit_mb=together // 1_000_000 + 3)):
        pass
    least = max(plan.total for plan in plans) // 1_000_000 + 1
    assert least < together // 1_000_000 - 3
    with (
        pytest.raises(EdgelmError, match="memory limit"),
        open_service(dataclasses.replace(small, memory_limit_mb=least)),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ('model = "a"', ("a",)),
        ('model = ["a", "b"]', ("a", "b")),
        ("", ("builtin",)),
    ],
)
def test_the_model_setting_takes_one_bundle_or_several(text: str, models: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "edgelm.toml"
    file.write_text(text)
    assert load_config(file, {}, {}).models == models
    assert load_config(file, {"EDGELM_MODEL": "c, d"}, {}).models == ("c", "d")
    assert load_config(file, {"EDGELM_MODEL": "c"}, {"model": ("e",)}).models == ("e",)
    assert load_config(file, {"EDGELM_MODEL": "c"}, {"model": None}).models == ("c",)
    for wrong in ("model = 3", "model = []", 'model = ""', 'model = ["a", 3]', 'model = [""]'):
        file.write_text(wrong)
        with pytest.raises(EdgelmError, match="model"):
            load_config(file, {}, {})
