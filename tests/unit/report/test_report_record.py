import json
from contextlib import suppress

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur import report as R
from secateur import types as T
from secateur.errors import FileRefusedError


def full(make, snapshot, hostile):
    return make(
        before=snapshot(latency=(2.0, 1.9, 2.1, 20), quality={"accuracy": 0.9}),
        name=hostile,
        locked=[R.Locked.of(hostile, T.Lock("output", "aten.view", "head", "m.py:3", "none"), params=7)],
        training=[
            R.TrainingPoint(step=0, loss=None, lr=0.1),
            R.TrainingPoint(step=1, loss=0.5, lr=0.1, quality=0.8),
        ],
        degradations=[T.Degradation("solve", "damping raised", "singular")],
        after_cut_quality={"accuracy": 0.5},
        recipe={"a": [1, {"b": None}], "x": hostile},
        command="secateur prune x\nand on",
        target={"macs": 0.5},
        achieved={"macs": 0.49},
    )


def whole(report):
    """The fields of a report as they are."""
    fields = dict(report)
    del fields["schema_version"]
    assert R.Report(**fields) == report, "they make the report again"
    return fields


def test_a_record_survives_json_unchanged(make, snapshot, hostile):
    record = full(make, snapshot, hostile)
    text = record.to_json()
    assert R.Report.from_json(text) == record
    assert R.Report.from_json(text).to_json() == text


def test_json_is_canonical(make, snapshot, hostile):
    text = full(make, snapshot, hostile).to_json()
    data = json.loads(text)
    assert text == json.dumps(data, sort_keys=True, indent=1) + "\n"
    assert text.isascii()
    assert data["schema"] == 1
    assert "\x1b" not in text


def test_the_published_schema_accepts_records_and_refuses_others(make, snapshot, hostile):
    schema = R.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    data = json.loads(full(make, snapshot, hostile).to_json())
    jsonschema.validate(data, schema)
    for key, value in [("schema", 2), ("status", "fine"), ("sparsity", 1.5), ("surprise", 1)]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | {key: value}, schema)


def test_the_keys_that_the_design_promises_are_there(make):
    data = json.loads(make().to_json())
    promised = "status before after sparsity criterion granularity target certificate degradations seconds"
    assert set(promised.split()) <= set(data)
    assert {"params", "nonzero", "macs", "macs_per", "size_bytes", "latency_ms", "quality"} == set(data["before"])


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema"),
        (lambda text: text.replace('"sparsity": 0.5,\n "status"', '"sparsity": NaN,\n "status"'), "NaN"),
        (lambda text: text.replace('"scope"', '"title"'), "twice"),
        (lambda text: text.replace('"scope"', '"scopes"'), "scope"),
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "[" * 100_000, "JSON"),
        (lambda text: "[]", "top level"),
        (lambda text: text.replace('"params": 500', '"params": "500"'), "after.params"),
        (lambda text: text.replace('"params": 500', '"params": -1'), "after.params"),
        (lambda text: text.replace('"params": 500', '"params": 1' + "0" * 5000), "JSON"),
    ],
)
def test_a_spoiled_file_is_refused_with_its_place(make, spoil, word):
    text = make().to_json()
    spoiled = spoil(text)
    assert spoiled != text
    with pytest.raises(FileRefusedError, match=word):
        R.Report.from_json(spoiled)


def test_bytes_that_are_no_text_and_files_that_are_too_long_are_refused(make):
    with pytest.raises(FileRefusedError):
        R.Report.from_json(b"\xff\xfe\x00")
    with pytest.raises(FileRefusedError, match="limit"):
        R.Report.from_json(make().to_json(), max_bytes=100)


def test_status_and_exit_code_follow_from_what_happened(make):
    fallback = [T.Degradation("solve", "damping")]
    cases = [
        (make(), "ok", 0),
        (make(degradations=fallback), "degraded", 7),
        (make(missed=True), "target_missed", 5),
        (make(missed=True, degradations=fallback), "target_missed", 5),
    ]
    for record, status, code in cases:
        assert (record.status, record.exit_code) == (status, code)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "degraded"},
        {"sparsity": 0.25},
        {"certificate": None},
        {"units": {"removed": 9, "total": 8, "what": "channels"}},
        {"achieved": {"macs": float("nan")}},
        {"before": T.Snapshot(-1, 0, None, 0)},
        {"before": T.Snapshot(1, 1, None, 2**63)},
        {"after": T.Snapshot(1, 1, None, 0, quality={"accuracy": float("inf")})},
        {"after": T.Snapshot(1, 1, None, 0, T.Latency(1.0, 1.0, float("inf"), 3))},
        {"after": T.Snapshot(1, 1, None, 0, T.Latency(1.0, 1.0, 1.0, 3, stopped="weather"))},
        {"certificate": T.Certificate(float("nan"), 1e-5, "float32", "replay")},
        {"degradations": (T.Degradation(3, "x"),), "status": "degraded"},
        {"locked": (T.Lock("not where"),)},
        {"locked": (R.Locked.of("x", T.Lock("y"), params=-1),)},
        {"recipe": {"x": float("inf")}},
    ],
)
def test_records_that_contradict_themselves_cannot_be_made(make, change):
    with pytest.raises(ValidationError):
        R.Report(**whole(make()) | change)


def test_percentiles_out_of_order_are_no_latency(make, snapshot):
    with pytest.raises(ValueError, match="p10"):
        T.Latency(1.0, 2.0, 3.0, 9)
    text = make(before=snapshot(latency=(2.0, 1.5, 2.5, 9))).to_json()
    with pytest.raises(FileRefusedError, match="p10"):
        R.Report.from_json(text.replace('"p10": 1.5', '"p10": 2.25'))


def test_a_report_of_before_reasons_for_stopping_were_kept_is_read(make, snapshot):
    text = make(before=snapshot(latency=(2.0, 1.5, 2.5, 9))).to_json()
    old = text.replace('"rounds": 9,\n   "stopped": null,', '"rounds": 9,')
    assert old != text
    assert R.Report.from_json(old) == R.Report.from_json(text)


def test_zeros_alone_always_carry_their_warning_once(make):
    record = make(applied="mask", certificate=None, certificate_reason="nothing was cut", warnings=["a", "a"])
    assert record.warnings == ("zeros only: no speed expected", "a")


def test_lone_surrogates_in_names_do_not_break_files(make):
    record = make(name="conv\ud800")
    assert R.Report.from_json(record.to_json()).layers[0].name == "conv\\ud800"
    R.render_html(record, charts=False).encode("utf-8")


def test_environment_names_versions_but_neither_host_nor_user():
    import getpass
    import platform

    found = R.environment(device="cpu", seed=11)
    assert (found.python, found.seed) == (platform.python_version(), 11)
    assert platform.node() not in found.model_dump_json()
    assert getpass.getuser() not in found.cpu


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_only_a_refusal_escapes_from_a_damaged_file(make, data):
    raw = bytearray(make().to_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(FileRefusedError):
        record = R.Report.from_json(bytes(raw))
        assert R.Report.from_json(record.to_json()) == record
