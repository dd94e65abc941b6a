"""What a model's folder says is honoured; what it lacks is refused with a remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel.errors import BilevelError, ProblemError, RequirementError
from bilevel_problems.mllm_hft.models.adapters import start_lora
from bilevel_problems.mllm_hft.models.checkpoint import Checkpoint
from bilevel_problems.mllm_hft.models.instructions import conversations
from bilevel_problems.mllm_hft.models.network import HALF, call, parameters
from bilevel_problems.mllm_hft.sources.shapes import Shapes
from tests.problems.mllm_hft.models import folders

pytest.importorskip("transformers", reason="the models are transformers' own")
pytest.importorskip("peft", reason="LoRA goes through peft")


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"  # peft asks transformers by its old name
)


@pytest.fixture
def llava(folder, tmp_path) -> Path:
    """A copy of the LLaVA folder, to be spoilt."""
    return Path(shutil.copytree(folder("llava"), tmp_path / "llava"))


def loaded(path: Path | str, **options):
    events = Checkpoint(path=str(path), rank=2, embedding=8, **options).open(Shapes(), None, 0)
    notes = []
    while True:
        try:
            notes.append(next(events).note)
        except StopIteration as stop:
            return stop.value, notes


def loss(made, weights=None) -> float:
    """Mean loss of an answer without a picture, LoRA as the run starts it."""
    rows = conversations([[("Is there a dog?", "Yes")]], made.tokenizer, made.template)
    logits = call(
        made.network,
        weights or start_lora(made.network, None),
        "logits",
        ids=rows.ids,
        mask=rows.mask,
    )
    each = torch.nn.functional.cross_entropy(logits[0], rows.ids[0], reduction="none")
    return float(each[rows.counted[0]].mean())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def rewrite(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_without_its_projector_is_refused(llava):
    rewrite(llava, {n: v for n, v in weights(llava).items() if "projector" not in n})
    with pytest.raises(
        RequirementError, match=r"lacks weights, .*multi_modal_projector.*and 1 more"
    ):
        loaded(llava)


def test_names_of_the_original_llava_are_told_with_the_remedy(llava):
    renamed = {
        n.replace("multi_modal_projector.linear_1", "mm_projector.0"): v
        for n, v in weights(llava).items()
    }
    rewrite(llava, renamed)
    with pytest.raises(RequirementError, match=r"mm_projector.*convert_llava_weights_to_hf"):
        loaded(llava)


def test_the_config_of_the_original_llava_is_told_with_the_remedy(llava):
    said = {"model_type": "llava", "mm_vision_tower": "openai/clip", "hidden_size": 32}
    (llava / "config.json").write_text(json.dumps(said))
    with pytest.raises(RequirementError, match="convert_llava_weights_to_hf"):
        loaded(llava)


def test_a_shape_that_differs_is_refused(llava):
    tensors = weights(llava)
    name = next(n for n in tensors if n.endswith("linear_2.weight"))
    rewrite(llava, {**tensors, name: torch.zeros(32, 31)})
    with pytest.raises(RequirementError, match=r"cannot be loaded.*save_pretrained"):
        loaded(llava)


def test_a_download_cut_short_is_refused(llava):
    file = llava / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RequirementError, match=r"cannot be loaded \(SafetensorError"):
        loaded(llava)


class Planted:
    """Unpickled, it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return self.mark.touch, ()


@pytest.mark.parametrize(
    ("whole", "pickled"),
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("adapter_model.safetensors", "adapter_model.bin"),
    ],
)
def test_pickled_weights_are_refused_and_not_read(whole, pickled, llava, tmp_path):
    if whole.startswith("adapter"):
        with_adapter(llava, whole=True)
    mark = tmp_path / "mark"
    weights = load_file(llava / whole)
    (llava / whole).unlink()
    torch.save(weights, llava / pickled)  # which torch's restricted reader would take
    with pytest.raises(RequirementError, match=r"safetensors"):
        loaded(llava)
    torch.save(Planted(mark), llava / pickled)
    with pytest.raises(RequirementError, match=r"safetensors"):
        loaded(llava)
    assert not mark.exists()
    torch.load(llava / pickled, weights_only=False)
    assert mark.exists()  # negative control: it is planted well


def test_a_shard_that_is_missing_is_refused(llava):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    (llava / "model.safetensors").unlink()
    model.save_pretrained(llava, max_shard_size="3MB")
    sorted(llava.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(RequirementError, match=r"cannot be loaded.*model-0"):
        loaded(llava)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "cannot be loaded"),
        ("tokenizer.json", "tokenizer"),
        ("preprocessor_config.json", "picture processor"),
        ("chat_template.jinja", r"no chat template.*problem\.model\.template"),
    ],
)
def test_a_file_that_is_missing_is_refused(file, words, llava):
    (llava / file).unlink()
    with pytest.raises(RequirementError, match=words) as caught:
        loaded(llava)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nothere", r"there is no folder .*/nothere, and as an id of the hub it cannot be loaded"),
        ("models/nothere", r"there is no folder .*/models/nothere, and as an id of the hub"),
        ("/nothere/llava", r"/nothere/llava: there is no such folder"),
        ("./nothere", r".*/nothere: there is no such folder"),
        ("a/b/nothere", r".*/a/b/nothere: there is no such folder"),
        ("config.json", r".*/config\.json: is a file, not a folder"),
    ],
)
def test_a_folder_that_is_not_there_is_said_to_be_so(path, words, llava, monkeypatch):
    monkeypatch.chdir(llava)
    with pytest.raises(
        RequirementError, match=rf"problem\.model\.path = '{path}': {words}"
    ) as caught:
        loaded(path)
    assert "give a folder with config.json" in str(caught.value)


def test_the_base_of_an_adapter_that_is_not_there_is_said_to_be_so(llava):
    adapter = with_adapter(llava, whole=False)
    loaded(adapter)  # negative control
    llava.rename(llava.parent / "elsewhere")
    with pytest.raises(RequirementError, match=r"names the base '.*llava': .*no such folder"):
        loaded(adapter)


def test_a_config_cut_short_is_refused(llava):
    file = llava / "config.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(RequirementError, match=r"config\.json is cut short"):
        loaded(llava)


def test_a_family_that_is_not_known_is_refused_before_its_weights_are_read(llava):
    said = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps({**said, "model_type": "vipllava"}))
    (llava / "model.safetensors").unlink()
    with pytest.raises(ProblemError, match=r"'vipllava'.*known are llava"):
        loaded(llava)


def test_a_template_of_the_recipe_comes_before_the_folders(llava):
    made, _ = loaded(llava, template="[INST] <image>\n{prompt} [/INST]")
    assert made.template.before == "[INST] "


def test_end_tokens_are_those_of_generation_config(llava):
    file = llava / "generation_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "eos_token_id": [2, 32003]}))
    made, _ = loaded(llava)
    assert made.tokenizer.ends == made.network.ends == (2, 32003)
    picture = torch.zeros(1, 4, 16)
    asked = torch.tensor([5, 6])
    plain = made.network.captions(features=picture, ids=asked, length=6)[0].tolist()
    made.network.ends = (2, plain[1])
    assert made.network.captions(features=picture, ids=asked, length=6)[0].tolist() == plain[:2]


def test_a_pad_token_added_without_a_row_is_replaced(llava):
    import transformers

    raw = transformers.AutoTokenizer.from_pretrained(llava)
    raw.add_special_tokens({"pad_token": "<nothing>"})
    raw.save_pretrained(llava)
    made, _ = loaded(llava)
    assert raw.pad_token_id == made.tokenizer.rows
    assert made.tokenizer.pad == made.tokenizer.end
    assert loss(made) > 0


def test_a_token_of_the_template_without_a_row_is_refused(llava):
    import transformers

    raw = transformers.AutoTokenizer.from_pretrained(llava)
    raw.add_special_tokens({"additional_special_tokens": ["<new>"]})
    raw.save_pretrained(llava)
    with pytest.raises(BilevelError, match=r"'<new>'.*resize_token_embeddings"):
        loaded(llava, template="<new> <image>\n{prompt}")


def with_adapter(llava: Path, *, whole: bool, **options) -> Path:
    """A trained LoRA, in the model's own folder (whole) or in one of its own beside it."""
    import peft
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    targets = options.pop("targets", r".*language_model.*\.(q_proj|v_proj)")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets))
    g = torch.Generator().manual_seed(7)
    for name, value in tuned.named_parameters():
        if ".lora_" in name:
            value.data = torch.randn(value.shape, generator=g) * 0.2
    target = llava if whole else llava.parent / "adapter"
    tuned.save_pretrained(target)
    return target


@pytest.mark.parametrize("how", ["merge", "continue"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_of_the_folder_is_where_the_run_starts(whole, how, llava):
    import peft
    import transformers

    base = loss(loaded(llava)[0])
    folder = with_adapter(llava, whole=whole)
    made, notes = loaded(folder, adapter=how)
    bare = llava
    if whole:
        bare = Path(shutil.copytree(llava, llava.parent / "bare"))
        for file in bare.glob("adapter_*"):
            file.unlink()
    plain = transformers.AutoModelForImageTextToText.from_pretrained(bare)
    merged = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload()
    merged.save_pretrained(bare.parent / "merged")
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(bare / file, bare.parent / "merged")
    tuned = loss(loaded(bare.parent / "merged")[0])
    assert loss(made) == pytest.approx(tuned, rel=1e-5)
    assert abs(tuned - base) > 1e-2  # the negative control: the adapter matters
    assert any("rank 3" in note and how in note for note in notes)


def test_a_continued_adapter_is_trained_further_and_a_merged_one_is_frozen(llava):
    with_adapter(llava, whole=True)
    kept, notes = loaded(llava, adapter="continue")
    lora = parameters(kept.network, "lora")
    assert len(lora) == 2 * 2 * 2  # layers, q and v, A and B
    assert {v.shape[0] for n, v in lora.items() if ".lora_A." in n} == {3}
    assert any("2 q_proj, 2 v_proj, continued" in note for note in notes)
    start = start_lora(kept.network, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, lora[name]) for name, value in start.items())
    merged, _ = loaded(llava, adapter="merge")
    assert len(parameters(merged.network, "lora")) == 2 * 7 * 2


def test_an_adapter_of_the_tower_can_be_merged_and_not_continued(llava):
    with_adapter(llava, whole=True, targets=r".*\.(q_proj|v_proj)")
    with pytest.raises(ProblemError, match=r"vision_tower.*adapter=merge"):
        loaded(llava, adapter="continue")
    loaded(llava, adapter="merge")


def test_an_adapter_that_lacks_weights_or_is_of_another_model_is_refused(llava):
    with_adapter(llava, whole=True)
    file = llava / "adapter_model.safetensors"
    saved = load_file(file)
    first = sorted(saved)[0]
    save_file({n: v for n, v in saved.items() if n != first}, file)
    with pytest.raises(RequirementError, match=r"lacks weights for 1 places"):
        loaded(llava)
    save_file({**saved, first: torch.zeros(3, 5)}, file)
    with pytest.raises(RequirementError, match=r"belongs to another model"):
        loaded(llava)
    file.unlink()
    with pytest.raises(RequirementError, match=r"adapter_model\.safetensors"):
        loaded(llava)


def test_bfloat16_is_kept_and_what_is_trained_is_not(llava):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.bfloat16)
    model.save_pretrained(llava)
    made, _ = loaded(llava)
    made.network.place(torch.device("cpu"), torch.float32)
    trained = {n for g in ("lora", "projector", "heads") for n in parameters(made.network, g)}
    kinds = {n: p.dtype for n, p in made.network.named_parameters()}
    assert {kinds[n] for n in trained} == {torch.float32}
    assert {kinds[n] for n in kinds.keys() - trained} == {torch.bfloat16}
    assert torch.bfloat16 in HALF
    wide, _ = loaded(llava, weights="float32")
    assert {p.dtype for p in wide.network.parameters()} == {torch.float32}
    assert loss(made) == pytest.approx(loss(wide), rel=5e-2)


@pytest.mark.parametrize(
    ("kind", "maps"),
    [
        ("Phi3Config", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("PhiConfig", {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        ("MixtralConfig", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_lora_is_on_every_linear_map_whatever_its_name(kind, maps, tmp_path):
    import transformers

    given = {**folders.TEXT, "vocab_size": 32027}
    more = {"num_local_experts": 2} if kind == "MixtralConfig" else {}
    text = getattr(transformers, kind)(**given, **more)
    made, notes = loaded(folders.llava(tmp_path / kind, text=text))
    covered = [n for n in notes if "LoRA on" in n]
    assert all(name in covered[0] for name in maps)
    lora = parameters(made.network, "lora")
    own = {n.split(".lora_A")[0].rpartition(".")[2] for n in lora if ".lora_A" in n}
    assert maps <= own
    if kind == "MixtralConfig":
        assert "experts.gate_up_proj" in covered[0]
        assert any("experts" in n for n in lora)
    at = {
        n: (v + 0.02).requires_grad_()
        for n, v in start_lora(made.network, torch.Generator().manual_seed(0)).items()
    }
    ids = torch.tensor([[5, 6, 7]])
    value = call(made.network, at, "text", ids=ids, mask=torch.ones_like(ids).bool()).square().sum()
    first = torch.autograd.grad(value, list(at.values()), create_graph=True)
    norm = torch.stack([g.square().sum() for g in first]).sum()
    second = torch.autograd.grad(norm, list(at.values()))
    assert all(float(g.abs().sum()) > 0 for g in second)
