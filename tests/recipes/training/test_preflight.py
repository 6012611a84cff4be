"""What is missing is reported before anything is loaded: key, what is missing, value, remedy, one line each."""

import dataclasses
import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status

import train_grpo
from recipes.config.load import ConfigError, load_config
from recipes.training.preflight import Machine, _head, _older, check, explain, missing

OF_OPTIMIZERS = {"torchao", "optimi", "galore_torch"}
ALL = frozenset(
    {"unsloth", "vllm", "vllm_bnb_plugin", "bitsandbytes", "flash_attn", "flash_attn_3", *OF_OPTIMIZERS}
)
GPU = Machine(cuda=True, bfloat16=True, packages=ALL)
T4 = Machine(cuda=True, bfloat16=False, packages=ALL)
CPU = Machine(cuda=False, bfloat16=True, packages=ALL)
NO_PLUGIN = Machine(cuda=True, bfloat16=True, packages=ALL - {"vllm_bnb_plugin"})
OLD_VLLM = replace(GPU, vllm="0.20.1+cu130")
VLLM_WITHOUT_PLUGIN = replace(NO_PLUGIN, vllm="0.28.0rc1")
VLLM_THAT_NEEDS_NONE = replace(NO_PLUGIN, vllm="0.27.3")
BARE = Machine(cuda=True, bfloat16=True, packages=frozenset())
FILE = """\
model:
  loader: transformers
  name: {name}
task:
  name: countdown
lora:
  r: 4
"""


@pytest.fixture
def configured(tmp_path, without_unsloth):
    """A function: the configuration with these overrides."""

    def configure(*overrides, name="some/model"):
        path = tmp_path / "run.yaml"
        path.write_text(FILE.format(name=name))
        return load_config(path, list(overrides))

    return configure


MISSING = [
    (CPU, ["model.load_in_4bit=true"], "model.load_in_4bit: needs a GPU", "set model.load_in_4bit: false"),
    (CPU, ["model.compile_layers=true"], "model.compile_layers: needs a GPU", "set it to false"),
    (CPU, ["model.load_in_8bit=true"], "model.load_in_8bit: needs a GPU", "set model.load_in_8bit: false"),
    (BARE, ["model.load_in_4bit=true"], "model.load_in_4bit: bitsandbytes is not", "requirements-cuda.lock"),
    (CPU, ["grpo.use_vllm=true"], "grpo.use_vllm: vLLM needs a GPU", "set grpo.use_vllm: false"),
    (BARE, ["grpo.use_vllm=true"], "grpo.use_vllm: vLLM is not installed", "requirements-cuda.lock"),
    (
        NO_PLUGIN,
        ["grpo.use_vllm=true", "model.load_in_4bit=true"],
        "grpo.use_vllm: vLLM reads 4-bit",
        "pip install",
    ),
    (
        VLLM_WITHOUT_PLUGIN,
        ["grpo.use_vllm=true", "model.load_in_4bit=true"],
        "grpo.use_vllm: vLLM reads 4-bit",
        "pip install",
    ),
    (
        OLD_VLLM,
        ["grpo.use_vllm=true"],
        "grpo.use_vllm: vLLM 0.20.1+cu130 is too old",
        "requirements-cuda.lock",
    ),
    (BARE, ["model.loader=unsloth"], "model.loader: Unsloth is not installed", "requirements-cuda.lock"),
    (
        CPU,
        ["model.attn_implementation=flash_attention_2"],
        "model.attn_implementation: needs a GPU",
        "set it to sdpa",
    ),
    (
        BARE,
        ["model.attn_implementation=flash_attention_2"],
        "model.attn_implementation: flash_attn is not installed",
        "pip install flash-attn",
    ),
    (CPU, ["grpo.optim=paged_adamw_8bit"], "grpo.optim: needs a GPU", "adamw_torch_fused"),
    (CPU, ["grpo.optim=paged_adamw_32bit"], "grpo.optim: needs a GPU", "adamw_torch_fused"),
    (BARE, ["grpo.optim=adamw_8bit"], "grpo.optim: bitsandbytes is not installed", "requirements-cuda.lock"),
    (BARE, ["grpo.optim=stable_adamw"], "grpo.optim: optimi is not installed", "pip install torch-optimi"),
    (BARE, ["grpo.optim=adamw_torch_8bit"], "grpo.optim: torchao is not installed", "pip install torchao"),
    (
        BARE,
        ["grpo.optim=galore_adamw_8bit_layerwise"],
        "grpo.optim: galore_torch is not installed",
        "/jiaweizzhao/GaLore",
    ),
    (CPU, ["head.impl=trl"], "head.impl: TRL's needs a GPU", "set it to memhead or full"),
    (CPU, ["head.backend=triton"], "head.backend: needs a GPU", "set it to torch or null"),
    (T4, ["model.dtype=bfloat16"], "model.dtype: this GPU has no bfloat16", "set it to float16 or auto"),
]


def test_vllm_reads_4_bit_weights_itself_up_to_0_27(configured):
    config = configured("grpo.use_vllm=true", "model.load_in_4bit=true")
    assert not list(missing(config, VLLM_THAT_NEEDS_NONE))


@pytest.mark.parametrize(("machine", "overrides", "what", "remedy"), MISSING, ids=lambda x: str(x)[:40])
def test_what_the_machine_lacks(configured, machine, overrides, what, remedy):
    (problem,) = missing(configured(*overrides), machine)
    line = problem.line("")
    assert line.startswith(what)
    assert remedy in line
    assert overrides[0].partition("=")[2] in line
    assert "\n" not in line


def test_compiled_layers_need_the_gpu_and_one_process(configured):
    def messages(**changed):
        config = configured("model.compile_layers=true").model_copy(update=changed)
        return [problem.message for problem in missing(config, GPU)]

    assert messages() == []
    assert messages(processes=2) == ["with 2 processes it has not been tried"]
    kept_off = configured("model.compile_layers=true", "grpo.use_cpu=true", "grpo.bf16=false")
    assert [problem.key for problem in missing(kept_off, GPU)] == ["model.compile_layers"]


def test_unsloths_own_head_runs_on_a_cpu(configured):
    trls = configured("head.impl=trl")
    assert [problem.key for problem in _head(trls, CPU)] == ["head.impl"]
    assert not list(_head(configured("head.impl=trl", "model.loader=unsloth"), CPU))


@pytest.mark.parametrize(
    "overrides", sorted({tuple(case[1]) for case in MISSING if "unsloth" not in case[1][0]})
)
def test_a_complete_machine_lacks_nothing(configured, overrides):
    assert list(missing(configured(*overrides), GPU)) == []


def test_a_server_of_vllm_needs_its_package_and_a_gpu_here_too(configured):
    config = configured("grpo.use_vllm=true", "grpo.vllm_mode=server")
    assert list(missing(config, GPU)) == []
    assert [problem.message for problem in missing(config, BARE)] == ["vLLM is not installed"]
    assert [problem.message for problem in missing(config, CPU)] == ["vLLM needs a GPU, and there is none"]


def test_every_problem_is_listed(configured):
    config = configured("model.load_in_4bit=true", "grpo.use_vllm=true", name="/nowhere/at/all")
    with pytest.raises(ConfigError) as caught:
        check(config, CPU)
    assert [line.partition(":")[0] for line in caught.value.lines] == [
        "model.load_in_4bit",
        "grpo.use_vllm",
        "model.name",
    ]


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_folder_that_is_not_there(configured, name):
    with pytest.raises(ConfigError, match=r"model\.name: there is no such folder"):
        check(configured(name=name), GPU)


def test_a_folder_without_a_model(configured, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.name: holds no config\.json.*folder of a saved model"):
        check(configured(name=str(tmp_path)), GPU)


@pytest.mark.parametrize("text", ["{", "[]", "", "[" * 100_000, "null"])
def test_a_configuration_that_is_none(configured, tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ConfigError, match=r"model\.name: holds a config\.json that is no JSON object"
    ) as raised:
        check(configured(name=str(tmp_path)), GPU)
    assert len(raised.value.lines) == 1
    run = tmp_path / "run.yaml"
    run.write_text("model: {loader: scratch}\ntask: {name: countdown}\n")
    (tmp_path / "adapter_config.json").write_text(text)
    for file in ("adapter_config.json", "config.json"):
        assert train_grpo.main(["--config", str(run), "--evaluate", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{tmp_path / file}: is no JSON object: it was cut off")
        (tmp_path / file).unlink()


def test_a_folder_needs_no_hub(configured, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.name: holds no weights \(model\.safetensors\)"):
        check(configured(name=str(tmp_path)), GPU)
    (tmp_path / "model.safetensors").touch()
    check(configured(name=str(tmp_path)), GPU)
    with pytest.raises(ConfigError, match=r"model\.tokenizer: holds no tokenizer_config\.json"):
        check(configured(f"model.tokenizer={tmp_path}", name=str(tmp_path)), GPU)


def test_the_hub_switched_off(configured, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        check(configured(), GPU)
    (line,) = caught.value.lines
    assert line.startswith(
        "model.name: is not in the cache, and the hub is switched off (value 'some/model')"
    )
    assert "unset HF_HUB_OFFLINE" in line
    assert "hf download some/model" in line


def test_no_network(configured, monkeypatch):
    """A port of this machine on which nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(ConfigError, match=r"model\.name: is not in the cache, and the hub cannot be reached"):
        check(configured(), GPU)


def test_a_malformed_name(configured):
    with pytest.raises(ConfigError, match=r"model\.name: is neither a local folder nor a hub id.*owner/name"):
        check(configured(name="'no name'"), GPU)


@pytest.mark.parametrize(
    ("status", "code", "what", "remedy"),
    [
        (403, "GatedRepo", "is gated", "hf auth login"),
        (404, "RepoNotFound", "the hub knows no such model", "check the spelling"),
        (401, "RepoNotFound", "the hub knows no such model", "hf auth login"),
        (404, "RevisionNotFound", "has no revision 'v9'", "set model.revision"),
        (404, "EntryNotFound", "has no config.json on the hub", "transformers' format"),
        (503, None, "the hub cannot be reached", "hf download some/model"),
    ],
)
def test_answers_of_the_hub(status, code, what, remedy):
    """huggingface_hub itself turns the answer into its error."""
    request = httpx.Request("HEAD", "https://hub.example/some/model/resolve/v9/config.json")
    answer = httpx.Response(status, headers={"X-Error-Code": code} if code else {}, request=request)
    with pytest.raises(HfHubHTTPError) as caught:
        hf_raise_for_status(answer)
    said = explain(caught.value, "some/model", "v9", "config.json")
    assert what in said[0]
    assert remedy in said[1]


def test_train_stops_with_2_and_leaves_no_folder(configured, tmp_path, capsys):
    config = configured(f"run.output_root={tmp_path / 'runs'}", name="/nowhere/model")
    assert train_grpo.train(config) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("model.name: there is no such folder (value '/nowhere/model')")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "key"),
    [("task.dataset=./nowhere", "task.dataset"), ("task.rewards={nowhere.it: 1}", "task.rewards")],
)
def test_data_and_rewards_that_are_not_there(tmp_path, capsys, override, key):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: scratch, tokenizer: bpe}\ntask: {name: gsm8k}\n")
    config = load_config(path, [override, f"run.output_root={tmp_path / 'runs'}"])
    assert train_grpo.train(config) == 2
    assert capsys.readouterr().err.startswith(f"{key}: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("grpo.fp16=true", "fp16 and bf16"),
        ("grpo.vllm_importance_sampling_clip_min=5.0", "must be less than"),
        ("grpo.accelerator_config={nonsense: 1}", "nonsense"),  # a TypeError of accelerate's
        ("grpo.dataloader_prefetch_factor=2", "dataloader_prefetch_factor"),
    ],
)
def test_what_grpo_config_refuses_leaves_no_folder(tmp_path, capsys, override, said):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: scratch}\ntask: {name: countdown}\ngrpo: {bf16: true, use_cpu: true}\n")
    config = load_config(path, [override, f"run.output_root={tmp_path / 'runs'}"])
    assert train_grpo.train(config) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("grpo: TRL refuses it: ")
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_more_processes_than_gpus_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: scratch}\ntask: {name: countdown}\n")
    config = load_config(path, processes=4)
    with pytest.raises(ConfigError, match=r"4 processes here, and there are 2 GPUs; .*--nproc-per-node 2 "):
        check(config, dataclasses.replace(GPU, processes_here=4, gpus=2))
    check(config, dataclasses.replace(GPU, processes_here=2, gpus=2))  # of four, on two machines
    on_cpu = load_config(path, ["grpo.use_cpu=true"], processes=4)
    check(on_cpu, dataclasses.replace(GPU, processes_here=4, gpus=2))


@pytest.mark.parametrize(
    ("version", "older"),
    [("0.9.1", True), ("0.20.1+cu130", True), ("0.21.0", False), ("0.21.0rc1", False), ("0.100.0", False),
     ("1.0", False), (None, False)],
)  # fmt: skip
def test_which_releases_are_older_than_0_21(version, older):
    assert _older(version, "0.21.0") is older


def test_unsloth_in_several_processes_is_refused(tmp_path, without_unsloth):
    path = tmp_path / "run.yaml"
    path.write_text("model: {loader: unsloth, name: some/model}\ntask: {name: gsm8k}\n")
    config = load_config(path, processes=2)
    with pytest.raises(ConfigError, match="with Unsloth 2 processes have not been tried"):
        check(config, dataclasses.replace(GPU, processes_here=2, gpus=2))


@pytest.mark.parametrize(("impl", "refused"), [("memhead", True), ("full", True), ("trl", False)])
def test_scoring_past_unsloths_head_matters_where_it_is_replaced(configured, monkeypatch, impl, refused):
    monkeypatch.setattr("recipes.training.preflight.import_unsloth", lambda standby: None)
    monkeypatch.setenv("UNSLOTH_GRPO_LOGPROB_RECOMPUTE", "1")
    config = configured("model.loader=unsloth", f"head.impl={impl}")
    said = [problem.message for problem in missing(config, GPU)]
    assert (
        said == ["UNSLOTH_GRPO_LOGPROB_RECOMPUTE=1 makes Unsloth score without memhead; unset it"] * refused
    )


def test_another_tokenizer_is_looked_for_on_its_own_main_branch(configured, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub")
    check(configured("model.revision=v1", "model.tokenizer=other/words"), GPU)
    assert [url.partition("://")[2].partition("/")[2] for url in asked] == [
        "some/model/resolve/v1/config.json",
        "other/words/resolve/main/tokenizer_config.json",
    ]


def test_unsloth_was_never_imported():
    assert sys.modules.get("unsloth") is None


def test_a_gpu_out_of_reach_is_told_from_none(configured, monkeypatch, tmp_path):
    torch_of_cpu = Machine(
        cuda=False, bfloat16=True, packages=ALL, no_gpu="this torch is for the CPU, beside an L4"
    )
    config = configured("model.load_in_4bit=true", name=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        check(config, torch_of_cpu)
    assert "model.load_in_4bit: needs a GPU, and this torch is for the CPU, beside an L4" in str(caught.value)
    assert "docs/troubleshooting.md#driver-cuda-and-vllm" in caught.value.lines[-1]


class Hub(BaseHTTPRequestHandler):
    """The hub's answer to "who am I", over HTTP; the real one is not reached from here."""

    status, said = 200, {}

    def do_GET(self):
        body = json.dumps(self.said).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A function: the hub says so from now on."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_x")

    def say(status, **said):
        Hub.status, Hub.said = status, said

    yield say
    server.shutdown()
    server.server_close()


ME = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


def uploaded(configured, tmp_path, *more):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    return configured("grpo.push_to_hub=true", *more, name=str(tmp_path))


def test_an_upload_is_checked_before_training(configured, hub, tmp_path, monkeypatch):
    config = uploaded(configured, tmp_path)
    hub(200, **ME)
    check(config, CPU)
    assert config.grpo_config("x").hub_model_id == "run"  # not the name of its folder of checkpoints
    named = uploaded(configured, tmp_path, "grpo.hub_model_id=lab/model")
    check(named, CPU)
    assert named.grpo_config("x").hub_model_id == "lab/model"
    with pytest.raises(
        ConfigError, match=r"grpo\.hub_model_id: is of an owner you are not .*name one of me, lab"
    ):
        check(uploaded(configured, tmp_path, "grpo.hub_model_id=other/model"), CPU)
    hub(200, **(ME | {"auth": {"accessToken": {"role": "read"}}}))
    with pytest.raises(ConfigError, match=r"grpo\.push_to_hub: the token may only read .*hf auth login"):
        check(config, CPU)
    hub(401, error="Invalid")
    with pytest.raises(ConfigError, match=r"grpo\.push_to_hub: the hub does not know the token"):
        check(config, CPU)
    hub(503)
    with pytest.raises(ConfigError, match=r"grpo\.push_to_hub: the hub cannot be reached"):
        check(config, CPU)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"grpo\.push_to_hub: nobody is logged in to the hub"):
        check(config, CPU)


UNDER_DEEPSPEED = [
    (
        ["model.load_in_4bit=true"],
        "model.load_in_4bit: quantised weights have not been tried under DeepSpeed",
    ),
    (
        ["model.load_in_8bit=true"],
        "model.load_in_8bit: quantised weights have not been tried under DeepSpeed",
    ),
    (
        ["grpo.cache_implementation=static"],
        "grpo.cache_implementation: DeepSpeed gathers weights while it samples",
    ),
    (["grpo.fp16=true"], "grpo.fp16: DeepSpeed looks for the scale of float16"),
    (["model.dtype=float16"], "grpo.fp16: DeepSpeed looks for the scale of float16"),
]


@pytest.mark.parametrize(("overrides", "said"), UNDER_DEEPSPEED)
def test_what_deepspeed_cannot_do_is_said_before_anything_is_loaded(configured, overrides, said):
    config, asked = configured(*overrides, name="."), replace(GPU, deepspeed=True)
    with pytest.raises(ConfigError) as refused:
        check(config, asked)
    assert said in str(refused.value)


def test_float16_of_a_card_without_bfloat16_too(configured):
    with pytest.raises(ConfigError, match=r"grpo\.fp16: DeepSpeed"):
        check(configured(name="."), replace(T4, deepspeed=True))


def test_deepspeed_is_asked_for_by_accelerates_launcher(configured, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert Machine.here().deepspeed
