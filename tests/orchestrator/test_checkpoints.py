"""The bytes of checkpoints are fixed, so that a run of an older version can continue."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from orchestrator.run_folder import checkpoints
from orchestrator.strategies.gkt.state import GktState, HeldShard, Teacher
from orchestrator.strategies.global_model import GlobalModel
from orchestrator.strategies.local import Local, LocalState
from wire.messages import BlobRef


def array(number):
    return np.full((2, 1), number, np.float32)


def noted(digest):
    """A blob as JSON."""
    digest *= 32
    return f'{{\n    "digest": "{digest}",\n    "size": 1000,\n    "chunk_bytes": 1024\n   }}'


GKT_TENSORS = {
    "server/fc.weight": array(1),
    "optimizer/0/exp_avg": array(2),
    "device/a/extractor.0.weight": array(3),
    "device/a/fc.weight": array(4),
    "extractor/a/0.weight": array(5),
    "shared/0.weight": array(6),
    "network/nets/small.py:make/fc.weight": array(7),
}
GKT_NOTES = f"""\
{{
 "shards": {{
  "a": {{
   "round": 3,
   "data_digest": "cd",
   "ref": {noted("aa")},
   "logits": {noted("bb")},
   "samples": 64,
   "view": 0,
   "cropped": true,
   "moved": 0.25
  }},
  "b": {{
   "round": 1,
   "data_digest": "ef",
   "ref": {noted("dd")},
   "logits": null,
   "samples": 32,
   "view": 5,
   "cropped": false
  }}
 }},
 "teachers": {{
  "a": {{
   "ref": {noted("cc")},
   "data_digest": "cd",
   "view": 7
  }}
 }},
 "schedule": {{
  "best": 0.5,
  "last_epoch": 2
 }},
 "blobs": [
  "{"aa" * 32}",
  "{"bb" * 32}",
  "{"cc" * 32}",
  "{"dd" * 32}"
 ]
}}"""


def ref(digest):
    return BlobRef(digest * 32, 1000, 1024)


GKT = GktState(
    server={"fc.weight": array(1)},
    optimizer={"0/exp_avg": array(2)},
    schedule={"best": 0.5, "last_epoch": 2},
    devices={"a": {"extractor.0.weight": array(3), "fc.weight": array(4)}},
    made_by={"a": {"0.weight": array(5)}},
    shared_extractor={"0.weight": array(6)},
    shared_heads={"nets/small.py:make": {"fc.weight": array(7)}},
    held={
        "a": HeldShard(3, "cd", ref("aa"), ref("bb"), 64, view=0, both_views=True, moved=0.25),
        "b": HeldShard(1, "ef", ref("dd"), None, 32, view=5, both_views=False),
    },
    teachers={"a": Teacher(ref("cc"), "cd", 7)},
)


@pytest.mark.parametrize(
    ("tensors", "notes", "state", "unpack"),
    [
        (
            {"global/fc.weight": array(1)},
            "{}",
            GlobalModel({"fc.weight": array(1)}),
            GlobalModel.unpack,
        ),
        (
            {"global/fc.weight": array(1)},
            '{\n "owed": {\n  "a": 3\n }\n}',
            GlobalModel({"fc.weight": array(1)}, {"a": 3}),
            GlobalModel.unpack,
        ),
        (
            {"device/a/fc.weight": array(1), "device/b/fc.weight": array(2)},
            "{}",
            LocalState({"a": {"fc.weight": array(1)}, "b": {"fc.weight": array(2)}}),
            Local(None).restore,
        ),
        (
            GKT_TENSORS,
            GKT_NOTES,
            GKT,
            lambda checkpoint: GktState.unpack(checkpoint, ["/home/me/./nets/small.py:make"]),
        ),
    ],
    ids=["global-model", "error-feedback", "local", "fedgkt"],
)
def test_a_checkpoint_is_read_and_written_as_ever(tmp_path, tensors, notes, state, unpack):
    written = tmp_path / "before/checkpoints/0003"
    written.mkdir(parents=True)
    (written / "state.safetensors").write_bytes(save(tensors))
    (written / "state.json").write_text(notes)
    restored = unpack(checkpoints.read(tmp_path / "before", 3))
    assert repr(restored) == repr(state)
    checkpoints.write(tmp_path / "after", 3, restored.pack(), "{}")
    for file in ("state.safetensors", "state.json"):
        now = (tmp_path / "after/checkpoints/0003" / file).read_bytes()
        assert now == (written / file).read_bytes(), file


def test_the_blobs_that_a_state_needs_are_those_that_it_names():
    assert GKT.pack().blobs() == set(json.loads(GKT_NOTES)["blobs"])
    assert GlobalModel({}).pack().blobs() == set()


def test_devices_with_a_shared_model_go_on_with_it_and_others_with_their_own():
    shared = GKT.network("nets/small.py:make", "a")
    assert sorted(shared) == ["extractor.0.weight", "fc.weight"]
    assert shared["extractor.0.weight"] is GKT.shared_extractor["0.weight"]
    assert GKT.network("resnet8", "a") is GKT.devices["a"]
