import importlib.util
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from gptoss import LLM, backends
from gptoss.checkpoint.open import open_checkpoint
from gptoss.errors import GptOssError
from gptoss.llm import memory, models, needs, plan
from gptoss.model.config import gpt_oss_20b, gpt_oss_120b, nano
from tests.llm.conftest import needs_native
from tests.llm.toy import write_toy

GB = 1e9


# --- the plan


@pytest.mark.parametrize(
    "config, weights", [(gpt_oss_20b(), 13.76 * GB), (gpt_oss_120b(), 65.24 * GB)]
)
def test_bfloat16_weights_take_what_they_take_on_disk(config, weights):
    taken = needs.estimate(config, "torch", "bfloat16", 16_384)
    assert taken.weights == pytest.approx(weights, rel=0.002)
    assert taken.working < 1.5 * GB
    packed = needs.estimate(
        config, "native", "exact", 16_384
    ).weights  # the dense ones without loss
    assert 0.5e9 < taken.weights - packed < 0.7e9


@pytest.mark.parametrize("config, cache", [(gpt_oss_20b(), 3.22 * GB), (gpt_oss_120b(), 4.84 * GB)])
def test_sliding_layers_keep_their_window_only(config, cache):
    assert needs.estimate(config, "torch", "bfloat16", 131_072).cache == pytest.approx(
        cache, rel=0.01
    )
    reference = needs.estimate(config, "reference", "float32", 131_072)
    assert reference.cache == pytest.approx(4 * cache, rel=0.01)  # all layers, float32


def test_20b_fits_a_machine_of_16_gb():
    assert needs.estimate(gpt_oss_20b(), "torch", "bfloat16", 16_384).total < 16 * GB


def test_mlx_is_taken_on_a_mac_for_what_is_not_tiny(monkeypatch):
    large = gpt_oss_20b()
    monkeypatch.setattr(plan, "_apple", lambda: False)
    assert plan.choose(large, "mlx", None)[:2] == ("mlx", "cpu")
    monkeypatch.setattr(plan, "_apple", lambda: True)
    assert plan.choose(large, "auto", None)[:2] == ("mlx", "gpu")
    assert plan.choose(large, "mlx", None)[:2] == ("mlx", "gpu")
    assert plan.choose(large, "auto", "gpu")[:2] == plan.choose(large, "mlx", "gpu")[:2]
    assert plan.choose(large, "mlx", "cpu")[:2] == ("mlx", "cpu")
    assert plan.choose(nano(), "auto", None)[0] != "mlx"
    assert plan.choose(large, "auto", None, dtype="float64")[0] != "mlx"  # which it has not
    assert plan.choose(large, "auto", None, native=True)[0] == "native"


def test_what_mlx_holds_is_in_the_plan():
    exact, fast, small = (
        needs.estimate(gpt_oss_20b(), "mlx", "bfloat16", 16_384, precision=p)
        for p in ("exact", "fast", "small")
    )
    assert exact.weights == pytest.approx(13.76 * GB, rel=0.002)
    assert exact.weights - fast.weights == pytest.approx((2.43 - 1.37) * GB, rel=0.01)
    assert exact.weights - small.weights == pytest.approx((2.43 - 0.76) * GB, rel=0.01)
    narrow = needs.estimate(gpt_oss_20b(), "mlx", "bfloat16", 16_384, kv="int8")
    assert narrow.cache == pytest.approx(exact.cache * 17 / 32)


def test_mlx_computes_narrow_models_in_float32_and_says_its_precision():
    opened = open_checkpoint(models.NANO)
    made = plan.make_plan(opened, backend="mlx", precision="fast", kv="int8")
    assert (made.dtype, made.precision, made.kv) == ("float32", "fast", "int8")
    assert "mlx backend in float32, fast precision (dense matrices in 8 bits) on cpu" in str(made)
    assert "tokens in int8" in str(made)
    assert plan.make_plan(opened, backend="mlx", dtype="bfloat16").precision == "exact"
    with pytest.raises(ValueError, match="mlx computes in float32 or bfloat16, not float64"):
        plan.make_plan(opened, backend="mlx", dtype="float64")


def test_packed_experts_are_a_quarter_of_bfloat16():
    dense, experts = needs.counts(gpt_oss_20b())
    wide = needs.estimate(gpt_oss_20b(), "torch", "bfloat16", 64, packed=False).weights
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


def test_fast_rounds_the_matrices_that_every_token_passes_through():
    c = gpt_oss_20b()
    exact, fast = (needs.estimate(c, "native", p, 16_384) for p in ("exact", "fast"))
    assert exact.weights - fast.weights == pytest.approx(1.216e9 * (1.55 - 17 / 16), rel=0.01)
    assert (exact.cache, exact.working) == (2 * fast.cache, fast.working)
    loose = needs.estimate(c, "native", "fast", 16_384, packed=False)
    assert loose.weights > 2.9 * fast.weights


def test_a_native_sliding_layer_holds_its_window_and_a_chunk():
    c = gpt_oss_20b()
    short, long = (needs.estimate(c, "native", "fast", n).cache for n in (640, 131_072))
    a_token = 24 * 2 * 8 * 64 * 2  # bytes over all layers
    assert short == 640 * a_token
    assert long == (640 + 131_072) * a_token // 2


@pytest.fixture
def machine(monkeypatch):
    """A function that says what the machine has."""

    def has(*, gpu=False, core=False, torch=True):
        monkeypatch.setattr(plan, "_gpu", lambda: gpu and torch)
        monkeypatch.setattr(plan, "_apple", lambda: False)
        monkeypatch.setattr(plan, "has_native", lambda: core)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: torch or None)

    return has


@pytest.mark.parametrize(
    "has, tiny, large",
    [
        ({}, "reference", "torch"),
        ({"torch": False}, "reference", "reference"),
        ({"core": True}, "native", "native"),
        ({"core": True, "torch": False}, "native", "native"),
        ({"gpu": True}, "reference", "torch cuda"),
        ({"gpu": True, "core": True}, "native", "torch cuda"),
    ],
)
def test_what_runs_a_model_follows_from_the_machine(machine, has, tiny, large):
    machine(**has)
    for config, expected in ((nano(), tiny), (gpt_oss_20b(), large)):
        chosen, device, why = plan.choose(config, "auto", None)
        assert f"{chosen} {device}".removesuffix(" cpu") == expected
        assert ("no compiled core" in why) == (not has.get("core") and device == "cpu")


def test_what_is_asked_for_decides(machine):
    machine(gpu=True, core=True)
    c = gpt_oss_20b()
    assert plan.choose(c, "auto", "cpu")[:2] == ("native", "cpu")
    assert plan.choose(c, "auto", "cpu", dtype="float32")[:2] == ("torch", "cpu")
    assert plan.choose(c, "auto", None, native=True)[:2] == ("native", "cpu")
    assert plan.choose(c, "torch", None)[:2] == ("torch", "cuda")
    assert plan.choose(nano(), "auto", "cuda")[:2] == ("torch", "cuda")
    assert plan.choose(nano(), "auto", None, dtype="float64")[:2] == ("reference", "cpu")
    for backend in ("reference", "native", "torch"):
        assert plan.choose(c, backend, "cpu") == (backend, "cpu", "as asked")


def test_torch_is_not_asked_for_a_gpu_where_no_driver_is(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(plan, "_free", lambda device: 80 * GB)
    monkeypatch.setattr(plan, "DRIVERS", [tmp_path / "none", tmp_path])
    assert plan._gpu()
    monkeypatch.setattr(plan, "DRIVERS", [tmp_path / "none"])
    assert not plan._gpu()


def test_native_is_fast_unless_the_model_is_narrow(toy, machine, monkeypatch):
    machine(core=True)
    opened = open_checkpoint(toy)
    made = plan.make_plan(opened)
    assert (made.backend, made.precision, made.dtype) == ("native", "exact", None)
    assert "native backend in exact precision (weights as published) on cpu" in str(made)
    assert plan.make_plan(opened, precision="fast").precision == "exact"
    monkeypatch.setattr(backends, "NARROW", 0)
    made = plan.make_plan(opened, threads=3)
    assert (made.precision, made.threads) == ("fast", 3)
    assert "fast precision (dense matrices in 8 bits) on cpu, 3 threads" in str(made)
    assert plan.make_plan(opened, precision="exact").needs.weights > made.needs.weights


def test_a_cache_of_int8_is_half_of_bfloat16s(toy, machine):
    machine(core=True)
    opened = open_checkpoint(toy)
    cache = {kv: plan.make_plan(opened, kv=kv).needs.cache for kv in ("bfloat16", "int8")}
    head = opened.config.head_dim
    assert cache["int8"] == pytest.approx(cache["bfloat16"] * (1 + 4 / head) / 2, rel=1e-6)


def test_the_cache_has_the_room_of_all_conversations(toy, machine):
    machine(core=True)
    one, eight = (plan.make_plan(open_checkpoint(toy), conversations=n) for n in (1, 8))
    assert eight.needs.cache == 8 * one.needs.cache and eight.max_tokens == one.max_tokens
    assert f"for 8 x {one.max_tokens} tokens" in str(eight)
    assert LLM.load(toy, conversations=8).tokens.engine.max_tokens == 8 * one.max_tokens
    with pytest.raises(ValueError, match="conversations must be at least 1"):
        plan.make_plan(open_checkpoint(toy), conversations=0)


def test_the_plan_reaches_the_native_room(toy, machine, monkeypatch):
    machine(core=True)
    asked = []

    def load_backend(name, config, read, **options):
        asked.append((name, options))
        raise GptOssError("enough")

    monkeypatch.setattr("gptoss.llm.tokens.load_backend", load_backend)
    with pytest.raises(GptOssError, match="enough"):
        LLM.load(toy, precision="exact", threads=2)
    options = {
        "dtype": None,
        "device": "cpu",
        "precision": "exact",
        "threads": 2,
        "kv": "float32",
        "resident": None,
    }
    assert asked == [("native", options)]


@needs_native
def test_the_native_backend_answers_as_the_reference(toy):
    replies = [
        LLM.load(toy, backend, **how).chat("hello", seed=3, max_tokens=20)
        for backend, how in (("reference", {}), ("native", {"precision": "fast", "threads": 1}))
    ]
    assert replies[0] == replies[1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"backend": "tpu"},
        {"dtype": "float16"},
        {"device": "cuda", "backend": "reference"},
        {"dtype": "bfloat16", "backend": "reference"},
        {"dtype": "float32", "backend": "native"},
        {"device": "cuda", "backend": "native"},
        {"precision": "exact", "backend": "reference"},
        {"precision": "fast", "backend": "torch"},
        {"precision": "fast", "device": "cuda"},
        {"precision": "finest"},
        {"threads": 2, "backend": "torch"},
        {"kv": "int8", "backend": "torch"},
        {"kv": "int4"},
        {"threads": 0},
        {"memory": 10**9, "backend": "torch"},
        {"memory": 1000, "backend": "native"},
        {"max_tokens": 0},
        {"max_tokens": 2049},
    ],
)
def test_what_cannot_be_is_a_value_error_before_loading(toy, wrong):
    with pytest.raises(ValueError):
        plan.make_plan(open_checkpoint(toy), **wrong)


def test_the_plan_says_layout_precision_bytes_backend_and_why(toy, machine):
    machine()
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


# 120b with room for 16,384 tokens, in fast precision, on a machine with 22 GB free and on others.
@pytest.mark.parametrize(
    "available, memory, total",
    [
        (None, None, None),
        (80 * GB, None, None),
        (22 * GB, None, 20.5 * GB),
        (22 * GB, 12 * GB, 12 * GB),
        (10 * GB, 12 * GB, 8.5 * GB),
        (80 * GB, 12 * GB, 12 * GB),
        (80 * GB, 79 * GB, None),
        (6 * GB, None, None),  # not even so
    ],
)
def test_experts_stay_on_disk_where_memory_is_too_little_for_all(available, memory, total):
    needed = needs.estimate(gpt_oss_120b(), "native", "fast", 16_384)
    assert needed.mapped == pytest.approx(60.9 * GB, rel=0.01)
    assert needed.visited == pytest.approx(1.9 * GB, rel=0.01)
    kept = plan.share(needed, available, memory)
    if total is None:
        assert kept is None
    else:
        assert kept + needed.total - needed.mapped == total and kept >= needed.layer


@pytest.mark.parametrize(
    "backend, numbers, packed",
    [("torch", "bfloat16", True), ("reference", "float32", True), ("native", "fast", False)],
)
def test_what_is_not_read_from_the_file_cannot_stay_on_disk(backend, numbers, packed):
    needed = needs.estimate(gpt_oss_20b(), backend, numbers, 1024, packed=packed)
    assert (needed.mapped, needed.least) == (0, needed.total)
    assert plan.share(needed, int(5 * GB), None) is None


def test_the_plan_says_what_stays_on_disk_and_what_that_costs(toy, machine, monkeypatch):
    machine(core=True)
    opened = open_checkpoint(toy)
    whole = plan.make_plan(opened)
    made = plan.make_plan(opened, memory=whole.total - whole.needs.layer // 2)
    assert made.total == whole.total - whole.needs.layer // 2
    kept, all_, read = (
        plan.size(n) for n in (made.resident, made.needs.mapped, made.needs.visited)
    )
    line = f"experts stay on disk, at most {kept} of their {all_} in memory; expect {read} read"
    assert str(made).splitlines()[2].startswith(line) and len(str(whole).splitlines()) == 2
    monkeypatch.setattr(plan, "available_memory", lambda: whole.total - 1)
    monkeypatch.setattr(plan, "RESERVE", whole.needs.layer // 2)
    tight = plan.make_plan(opened)
    assert tight.resident == tight.needs.mapped - tight.needs.layer // 2 - 1
    tight.check()


def test_longer_steps_of_a_prompt_read_less_from_disk_where_there_is_room(machine, monkeypatch):
    machine(core=True)
    monkeypatch.setattr(plan, "available_memory", lambda: None)
    packed = SimpleNamespace(name="huggingface", packed=True)
    large = SimpleNamespace(path="20b", config=gpt_oss_20b(), layout=packed, nbytes=int(13.8 * GB))
    needed = plan.make_plan(large).needs
    long = needs.estimate(large.config, "native", "fast", plan.ROOM, step=2048)
    assert 0.5 * GB < long.total - needed.total < 1 * GB
    for most, step in ((None, 512), (long.least - 1, 512), (long.least, 2048)):
        made = plan.make_plan(large, memory=most)
        assert (made.step_tokens, made.total) == (step, most or needed.total)


def test_below_one_layer_of_experts_it_is_refused(toy, machine, monkeypatch):
    machine(core=True)
    opened = open_checkpoint(toy)
    least = plan.make_plan(opened).needs.least
    with pytest.raises(ValueError, match="memory.* must be at least"):
        plan.make_plan(opened, memory=least - 1)
    assert plan.make_plan(opened, memory=least).resident == plan.make_plan(opened).needs.layer
    monkeypatch.setattr(plan, "RESERVE", 100)
    monkeypatch.setattr(plan, "available_memory", lambda: least + 99)
    with pytest.raises(GptOssError, match=f"or {plan.size(least + 100)} with its experts on disk"):
        plan.make_plan(opened).check()


@needs_native
def test_a_model_larger_than_its_memory_answers_alike(toy):
    whole = LLM.load(toy, "native")
    needed = whole.plan.needs
    tight = LLM.load(toy, memory=needed.least)
    assert tight.tokens.engine.backend.ops.resident.budget == needed.layer
    assert tight.chat("hello", seed=3, max_tokens=20) == whole.chat("hello", seed=3, max_tokens=20)


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
