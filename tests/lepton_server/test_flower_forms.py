"""Which forms of an object there are, and that they do not take more memory than they may."""

import hashlib

import numpy as np
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from lepton_fl.wire.downlink import unpack
from lepton_fl.wire.records import Records
from lepton_server.flower import frames
from lepton_server.flower.forms import Forms
from lepton_strategies.records import from_record_dict, to_record_dict

SIZE = 50_000
BYTES = 4 * SIZE


def model(round_number, run=0):
    start = np.random.default_rng(run).normal(0, 0.05, SIZE)
    steps = np.random.default_rng(run + 1).normal(0, 0.0005, (round_number, SIZE))
    return (start + steps.sum(axis=0)).astype(np.float32)


def chunks(array, **seams):
    return frames.chunks_of(frames.shared_arrays({"model": array}, seams))


def only(found):
    ((name, frame),) = found.values()
    return name, bytes(frame)


def test_a_device_gets_the_difference_if_it_has_the_round_before_and_else_the_whole():
    forms, first, second = Forms(), chunks(model(0)), chunks(model(1))
    (old_name, old), (name, new) = only(first), only(second)
    forms.make("r", first)
    assert forms.smallest(old_name, ["ab" * 32]) == forms.smallest(old_name, [])
    forms.make("r", second)
    change, whole = forms.smallest(name, ["ab" * 32, old_name]), forms.smallest(name, [name])
    assert len(change) < 0.75 * BYTES < len(whole) < 0.87 * BYTES
    assert unpack(change, name, {old_name: old}.get) == new == unpack(whole, name, {}.get)
    assert forms.smallest("ab" * 32, [old_name]) is None


def test_the_same_model_again_changes_nothing():
    """As when it was evaluated, and is then trained from; and for each group of a secure round."""
    forms, first, second = Forms(), chunks(model(0)), chunks(model(1))
    forms.make("r", first)
    forms.make("r", second)
    change = forms.smallest(only(second)[0], [only(first)[0]])
    forms.make("r", chunks(model(1)))
    assert forms.smallest(only(second)[0], [only(first)[0]]) is change


def test_runs_do_not_mix_and_are_forgotten():
    forms, mine, other = Forms(), chunks(model(0)), chunks(model(1))
    forms.make("r", mine)
    forms.make("s", other)
    assert forms.smallest(only(other)[0], [only(mine)[0]]) == forms.smallest(only(other)[0], [])
    forms.forget("r")
    assert forms.smallest(only(mine)[0], []) is None
    assert forms.smallest(only(other)[0], []) is not None
    forms.forget("s")
    assert (forms._last, forms._packed) == ({}, {})


def test_what_does_not_become_smaller_goes_as_it_is():
    forms = Forms()
    noise = chunks(np.frombuffer(np.random.default_rng(0).bytes(BYTES), np.float32))
    forms.make("r", noise)
    assert forms.smallest(only(noise)[0], []) is None


def test_memory_is_bounded():
    forms = Forms(budget=4 * BYTES)
    for run in range(5):
        for number in range(3):
            forms.make(str(run), chunks(model(number, run)))
            held = sum(last.size for last in forms._last.values())
            packed = sum(entry.size for entry in forms._packed.values())
            assert packed == 0 or held + packed <= 4 * BYTES
    small = Forms(budget=2 * BYTES)
    small.make("r", chunks(model(0)))
    assert small.smallest(only(chunks(model(0)))[0], []) is None


def test_frozen_numbers_are_in_chunks_of_their_own_and_old_devices_read_them():
    """The teacher of a distillation: its chunks have the same names in every round."""
    moving, frozen = 3_000, np.arange(4_000_000, dtype=np.float32)
    found = []
    for start in (0.0, 1.0):
        array = np.concatenate([np.full(moving, start, np.float32), frozen])
        record = frames.shared_arrays({"model": array}, {"model": moving})
        found.append(frames.chunks_of(record))
        content = to_record_dict(Records({"model": array}), arrays=record)
        objects = {name: bytes(item.deflate()) for name, item in get_all_nested_objects(content).items()}
        read = from_record_dict(inflate_object_from_contents(content.object_id, objects))
        np.testing.assert_array_equal(read.arrays["model"], array)
    names = [[name for name, _ in chunk.values()] for chunk in found]
    assert len(names[0]) == 5  # 12 kB, and 16 MB in pieces of at most 5 MiB
    assert (names[0][0] != names[1][0], names[0][1:]) == (True, names[1][1:])
    assert hashlib.sha256(bytes(found[0]["model", 1][1])).hexdigest() == names[0][1]
