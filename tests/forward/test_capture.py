"""Recording on CUDA as far as a CPU can tell, the mailbox, uploads."""

import contextlib
import inspect

import pytest
import torch

from handloom.cache.transfer import upload
from handloom.forward.programs.capture import CudaRecorder, Mailbox

CPU = torch.device("cpu")


def test_letters_stay_readable_for_as_many_turns_as_were_asked_for():
    mail, source = Mailbox(CPU, turns=3), torch.zeros(2)
    letters = []
    for step in range(5):
        source.fill_(step)
        letters.append(mail.send(source, source[:1])[0])
    assert [letter[0].tolist() for letter in letters[2:]] == [[2, 2], [3, 3], [4, 4]]
    assert letters[4][1].tolist() == [4]
    assert letters[0][0].data_ptr() == letters[3][0].data_ptr()  # buffers are used again, not made again
    wider = mail.send(torch.ones(3))[0]
    assert wider[0].tolist() == [1, 1, 1]


def test_uploads_keep_values_and_dtype():
    assert upload([[1, 2], [3, 4]], CPU).tolist() == [[1, 2], [3, 4]]
    assert upload([7], CPU).dtype == torch.int64
    assert upload([7], CPU, torch.int32).dtype == torch.int32


class FakeCuda:
    """What the recorder calls of torch.cuda, noted in order."""

    def __init__(self, monkeypatch, failing=False):
        self.calls, self.pools, outer = [], 0, self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                outer.calls.append(f"{self.name} waits for {other.name}")

        @contextlib.contextmanager
        def on(stream):
            outer.calls.append(f"on {stream.name}")
            yield
            outer.calls.append("off")

        signature = inspect.signature(torch.cuda.graph.__init__)

        @contextlib.contextmanager
        def record(*args, **kwargs):
            given = signature.bind(None, *args, **kwargs).arguments  # the names that torch knows
            outer.calls.append((given["pool"], given["stream"].name, given["capture_error_mode"]))
            yield
            if failing:
                raise RuntimeError("operation failed due to a previous error during capture")

        def handle():
            outer.pools += 1
            return outer.pools

        for name, value in {
            "Stream": lambda device: Stream("side"), "current_stream": lambda device: Stream("main"), "stream": on,
            "graph": record, "graph_pool_handle": handle, "CUDAGraph": object,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_warm_up_and_capture_share_a_stream_and_order_is_kept(monkeypatch):
    cuda, ran = FakeCuda(monkeypatch), []
    recorder = CudaRecorder(torch.device("cuda"))
    recorder.warm_up(lambda: ran.append("warm"))
    recorder.record(lambda: ran.append("recorded"))
    recorder.record(lambda: ran.append("recorded"))
    waits = ["side waits for main", "on side", "off", "main waits for side"]
    assert cuda.calls == [*waits, (1, "side", "thread_local"), (1, "side", "thread_local")]
    assert ran == ["warm", "recorded", "recorded"]


def test_a_spoilt_capture_leaves_its_pool(monkeypatch):
    cuda = FakeCuda(monkeypatch, failing=True)
    recorder = CudaRecorder(torch.device("cuda"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            recorder.record(lambda: None)
    assert [pool for pool, _, _ in cuda.calls] == [1, 2]
