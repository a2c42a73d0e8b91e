import importlib.util
from dataclasses import fields, replace

import numpy as np
import pytest

from gptoss import LLM
from gptoss.checkpoint.open import open_checkpoint
from gptoss.errors import GptOssError
from gptoss.llm import memory, models, plan
from gptoss.model.config import gpt_oss_20b, gpt_oss_120b, nano
from tests.llm.toy import write_toy

GB = 1e9


# --- the plan


@pytest.mark.parametrize(
    "config, weights", [(gpt_oss_20b(), 13.76 * GB), (gpt_oss_120b(), 65.24 * GB)]
)
def test_bfloat16_weights_take_what_they_take_on_disk(config, weights):
    needs = plan.estimate(config, "torch", "bfloat16", 16_384)
    assert needs.weights == pytest.approx(weights, rel=0.002)
    assert needs.working < 1.5 * GB


@pytest.mark.parametrize("config, cache", [(gpt_oss_20b(), 3.22 * GB), (gpt_oss_120b(), 4.84 * GB)])
def test_sliding_layers_keep_their_window_only(config, cache):
    assert plan.estimate(config, "torch", "bfloat16", 131_072).cache == pytest.approx(
        cache, rel=0.01
    )
    reference = plan.estimate(config, "reference", "float32", 131_072)
    assert reference.cache == pytest.approx(4 * cache, rel=0.01)  # all layers, float32


def test_20b_fits_a_machine_of_16_gb():
    assert plan.estimate(gpt_oss_20b(), "torch", "bfloat16", 16_384).total < 16 * GB


def test_packed_experts_are_a_quarter_of_bfloat16():
    dense, experts = plan.counts(gpt_oss_20b())
    wide = plan.estimate(gpt_oss_20b(), "torch", "bfloat16", 64, packed=False).weights
    assert wide == 2 * (dense + experts) == pytest.approx(41.8 * GB, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_the_reference_holds_of_a_small_model_is_in_the_plan(toy, dtype, tmp_path):
    def held(part):
        if isinstance(part, np.ndarray):
            return part.nbytes
        if isinstance(part, list | tuple):
            return sum(map(held, part))
        return sum(held(getattr(part, field.name)) for field in fields(part))

    for model in (write_toy(tmp_path, config=nano()), toy):
        loaded = LLM.load(model, "reference", dtype)
        assert loaded.plan.needs.weights >= held(loaded.tokens.engine.backend.weights) > 0


def test_a_tiny_model_runs_on_numpy_and_a_large_one_on_torch(monkeypatch):
    monkeypatch.setattr(plan, "_free", lambda device: None)
    assert plan.choose(nano(), "auto", None)[:2] == ("reference", "cpu")
    assert plan.choose(gpt_oss_20b(), "auto", None)[:2] == ("torch", "cpu")
    monkeypatch.setattr(plan, "_free", lambda device: 80 * GB)
    assert plan.choose(nano(), "auto", None)[:2] == ("reference", "cpu")
    assert plan.choose(gpt_oss_20b(), "auto", None)[:2] == ("torch", "cuda")
    assert plan.choose(gpt_oss_20b(), "auto", "cpu")[:2] == ("torch", "cpu")
    assert plan.choose(nano(), "auto", "cuda")[:2] == ("torch", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    chosen, _, why = plan.choose(gpt_oss_20b(), "auto", None)
    assert chosen == "reference" and "not installed" in why


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "tpu"},
        {"dtype": "float16"},
        {"device": "cuda", "backend": "reference"},
        {"dtype": "bfloat16", "backend": "reference"},
        {"max_tokens": 0},
        {"max_tokens": 2049},
    ],
)
def test_what_cannot_be_is_a_value_error_before_loading(toy, wrong):
    with pytest.raises(ValueError):
        plan.make_plan(open_checkpoint(toy), **wrong)


def test_the_plan_says_layout_precision_bytes_backend_and_why(toy):
    text = str(plan.make_plan(open_checkpoint(toy), max_tokens=100))
    for part in (
        "huggingface layout",
        "float32",
        "on disk",
        "reference",
        "this small",
        "100 tokens",
    ):
        assert part in text
    assert len(text.splitlines()) == 2


def test_too_little_memory_is_said_before_loading_unless_forced(toy, monkeypatch):
    monkeypatch.setattr(plan, "available_memory", lambda: 1_000_000)
    said = []
    with pytest.raises(GptOssError, match=r"needs about .* MB of memory.* 1\.0 MB are free\. \w+"):
        LLM.load(toy, announce=said.append, progress=lambda *_: pytest.fail("it was loading"))
    assert said, "the plan comes before the refusal"
    assert LLM.load(toy, force=True).plan.available == 1_000_000


def test_a_smaller_room_is_advised_where_it_would_help(toy):
    made = plan.make_plan(open_checkpoint(toy))
    tight = replace(made, available=made.needs.total - 1)
    with pytest.raises(GptOssError, match="--context"):
        tight.check()
    replace(made, available=None).check()


def test_loading_reports_every_tensor(toy):
    seen = []
    LLM.load(toy, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == len(seen)


@pytest.mark.parametrize(
    "n, text", [(0, "0 B"), (999, "999 B"), (2_000_000, "2.0 MB"), (13_760_000_000, "13.8 GB")]
)
def test_sizes_are_for_people(n, text):
    assert plan.size(n) == text


# --- how much memory there is


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A /proc and a /sys to write into."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_memory_is_what_the_kernel_calls_available(system):
    system(proc__meminfo="MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert memory.available_memory() == 64 * 1024


def test_a_containers_limit_counts_and_its_file_cache_does_not(system):
    system(
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="0::/a/b\n",
        cgroup__a__memory_dot_max="500000\n",
        cgroup__a__memory_dot_current="450000\n",
        cgroup__a__memory_dot_stat="anon 7\ninactive_file 100000\n",
        cgroup__a__b__memory_dot_max="max\n",
        cgroup__a__b__memory_dot_current="450000\n",
    )
    assert memory.available_memory() == 150_000


def test_the_older_control_groups_count_too(system):
    system(
        proc__meminfo="MemAvailable: 1000 kB\n",
        proc__self__cgroup="5:cpu,memory:/x\n",
        cgroup__memory__x__memory_dot_limit_in_bytes="9223372036854771712\n",
        cgroup__memory__x__memory_dot_usage_in_bytes="3000\n",
        cgroup__memory__memory_dot_limit_in_bytes="5000\n",
        cgroup__memory__memory_dot_usage_in_bytes="3000\n",
    )
    assert memory.available_memory() == 2000


def test_unknown_memory_is_none_and_refuses_nothing(system, monkeypatch, toy):
    monkeypatch.delattr("os.sysconf")
    assert memory.available_memory() is None
    made = plan.make_plan(open_checkpoint(toy))
    made.check()
    assert "unknown" in str(made)


# --- which model is meant


def test_a_path_is_itself_and_nano_is_in_the_package(toy):
    assert models.resolve(toy) == toy
    assert models.resolve("nano").parent.name == "assets"


@pytest.mark.parametrize(
    "name", ["nosuch", "./no/such", "a/b/c", "", "../x", "~nosuchuser/x/y", "x" * 5000]
)
def test_what_is_no_model_is_said_in_a_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptOssError):
        LLM.load(name)


def test_without_a_network_a_download_fails_in_a_sentence(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the Hub.\nMore lines.")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(GptOssError, match=r"^openai/gpt-oss-20b: cannot be downloaded .*network"):
        models.resolve("20b")


def test_without_the_library_a_download_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(GptOssError, match=r"gptoss\[hub\]"):
        models.resolve("openai/gpt-oss-20b")


def test_a_whole_snapshot_is_used_without_asking_the_network(toy, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def cached(name, **options):
        asked.append(options)
        assert options == {"local_files_only": True}, "the network was asked"
        return str(toy)

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert models.resolve("org/toy") == toy and asked


def test_only_the_files_that_are_needed_are_asked_for(toy, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(name, **options):
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError("nothing yet")
        assert {"config.json", "tokenizer.json", "*.safetensors"} <= set(options["allow_patterns"])
        assert set(options["ignore_patterns"]) == {"original/*", "metal/*"}
        return str(toy)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert models.resolve("org/toy") == toy


@pytest.mark.parametrize("error", [ValueError("a file, not a directory"), PermissionError()])
def test_a_cache_that_cannot_be_read_has_nothing(monkeypatch, error):
    hub = pytest.importorskip("huggingface_hub")

    def scan():
        raise error

    monkeypatch.setattr(hub, "scan_cache_dir", scan)
    assert models._cached() == {}


def test_what_lies_around_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "junk").mkdir(parents=True)
    write_toy(tmp_path / "checkpoints")
    assert "checkpoints/toy" in [item.name for item in models.found()]
