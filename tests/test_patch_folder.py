"""Patches in model folders: as in memory, for every family and its checkpoint's form; interruptions; refusals."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import safelocus as sl
from safelocus import organism
from safelocus.errors import ModelError, NumericalError, PatchError, ResourceError, SelectionError
from safelocus.model.layout import Layout
from safelocus.patch import Patch, apply_to_folder, diff, folder, revert_folder
from safelocus.patch.checkpoint import Checkpoint, local_folder
from safelocus.patch.state import bits
from safelocus.selection.sparse import gather
from safelocus.selection.topk import random_k
from test_patch import everything, same, strange
from tiny_models import NAMES, build
from tiny_targets import dense, moe

pytestmark = pytest.mark.slow  # writes models, again and again

FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture(autouse=True)
def _quiet_transformers():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def patch_of(model, k=150, seed=0, **options):
    layout = Layout.of(model)
    sizes = {name: layout.tensors[name].num_weights for name in layout.eligible_tensors}
    selection = sl.Selection(coordinates=random_k(sizes, k, seed=seed), layout=layout)
    return Patch.of(model, selection, new=strange(gather(model, selection), seed), **options)


def reloaded(model, path):
    return type(model).from_pretrained(path, dtype="auto")


@pytest.fixture
def stored(tmp_path):
    """A mixture of experts in several files, with a tokenizer: (folder, model as it loads, patch)."""
    target = moe()
    target.model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    target.tokenizer.save_pretrained(tmp_path / "model")
    model = reloaded(target.model, tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    return tmp_path / "model", model, patch_of(model)


USUAL = (
    "llama", "gpt2", "phi3", "gpt_neox", "falcon_7b", "t5", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
    "granitemoe", "deepseek_v3", "gpt_oss", "gemma4_moe",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in USUAL]
    + [(name, torch.bfloat16) for name in ("llama", "gpt2", "mixtral", "phi3")]
    + [pytest.param(name, torch.float32, marks=pytest.mark.slow) for name in NAMES if name not in USUAL],
)
def test_a_patched_folder_loads_as_the_patched_model(tmp_path, name, dtype):
    (built := build(name).to(dtype)).save_pretrained(tmp_path / "a", max_shard_size="20KB")
    model = reloaded(built, tmp_path / "a")
    patch = patch_of(model)
    before = everything(model)
    assert apply_to_folder(patch, tmp_path / "a", output=tmp_path / "b").num_weights == 150
    assert patch.apply(model)
    assert same(everything(reloaded(model, tmp_path / "b")), everything(model))
    assert revert_folder(patch, tmp_path / "b", output=tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "a")
    assert same(everything(reloaded(model, tmp_path / "c")), before)


@pytest.mark.parametrize(
    "name", [*USUAL, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in USUAL)]
)
def test_a_whole_model_is_saved_in_the_form_of_its_files(tmp_path, name):
    (built := build(name).to(torch.bfloat16)).save_pretrained(tmp_path / "a", max_shard_size="20KB")
    model = type(built).from_pretrained(tmp_path / "a", dtype=torch.float32)
    checkpoint = Checkpoint.open(tmp_path / "a")
    checkpoint.check_writable()
    folder.save_like(checkpoint, model, tmp_path / "same")
    assert contents(tmp_path / "same") == contents(tmp_path / "a")
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            if checkpoint.holds(tensor):  # else a table that no file has: its class makes it anew
                parameter.add_(torch.randn(parameter.shape)).copy_(parameter.bfloat16())
    folder.save_like(checkpoint, model, tmp_path / "b")
    assert same(everything(type(model).from_pretrained(tmp_path / "b", dtype=torch.float32)), everything(model))


def test_weights_that_were_not_trained_keep_their_files_values_also_in_a_narrower_type(tmp_path):
    dense().model.save_pretrained(tmp_path / "a")
    model = type(dense().model).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 7.0
    folder.save_like(Checkpoint.open(tmp_path / "a"), model, tmp_path / "b")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in "ab")
    assert not torch.equal(model.get_parameter(name).float(), after[name])  # the type in memory rounds
    before[name][0, 0] = 7.0
    assert same(after, before)


def test_a_conversion_that_computes_is_not_written_back(tmp_path, monkeypatch):
    from transformers.core_model_loading import MergeModulelist

    moe().model.save_pretrained(tmp_path)
    merge = MergeModulelist.convert

    def doubled(self, *arguments, **options):
        return {name: 2 * value for name, value in merge(self, *arguments, **options).items()}

    monkeypatch.setattr(MergeModulelist, "convert", doubled)
    with pytest.raises(ModelError, match=r"experts\.\w+ is computed from the files' tensors \(aten::mul\)"):
        Checkpoint.open(tmp_path).check_writable()


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_neox"])
def test_a_checkpoint_reads_and_finds_what_the_loader_makes(tmp_path, name):
    (built := build(name)).save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint, model = Checkpoint.open(tmp_path), reloaded(built, tmp_path)
    files = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
    for tensor, parameter in model.named_parameters():
        (form,) = checkpoint.forms(tensor)
        assert torch.equal(checkpoint.tensor(form), parameter)
        found = torch.empty(parameter.numel())
        for origin in checkpoint.locate(form, torch.arange(parameter.numel())):
            found[origin.positions] = files[origin.name].flatten()[origin.index]
        assert torch.equal(found, parameter.flatten())


def test_only_the_weights_bytes_change(stored, tmp_path):
    path, _, patch = stored
    outcome = apply_to_folder(patch, path, output=tmp_path / "out")
    before, after = contents(path), contents(tmp_path / "out")
    assert list(before) == list(after)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == list(outcome.files)
    for name in changed:
        assert len(before[name]) == len(after[name])
        length = int.from_bytes(before[name][:8], "little") + 8
        assert before[name][:length] == after[name][:length]
        with safe_open(tmp_path / "out" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert outcome.tensors == tuple(patch.new)
    assert not list(tmp_path.glob(".*"))


def test_in_place_and_back(stored):
    path, model, patch = stored
    before = contents(path)
    assert apply_to_folder(patch, path)
    patch.apply(model)
    assert same(everything(reloaded(model, path)), everything(model))
    patched = contents(path)
    again = apply_to_folder(patch, path)
    assert not again
    assert again.files == ()
    assert contents(path) == patched
    assert revert_folder(patch, path)
    assert not revert_folder(patch, path)
    assert contents(path) == before


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("finish", [apply_to_folder, revert_folder])
def test_an_interrupted_change_in_place_is_finished_or_undone(stored, monkeypatch, after, finish):
    """The experts of one tensor lie in several files, so some of a tensor is changed and some is not."""
    path, model, patch = stored
    before, replace, calls = contents(path), folder.os.replace, []

    def interrupt(source, destination):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(destination)
        replace(source, destination)

    monkeypatch.setattr(folder.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apply_to_folder(patch, path)
    monkeypatch.setattr(folder.os, "replace", replace)
    assert contents(path).keys() == before.keys()
    assert sum(contents(path)[name] != before[name] for name in before) == after
    finish(patch, path)
    if finish is revert_folder:
        assert contents(path) == before
    else:
        patch.apply(model)
        assert same(everything(reloaded(model, path)), everything(model))
        revert_folder(patch, path)
        assert contents(path) == before


def test_an_interrupted_copy_leaves_nothing(stored, tmp_path, monkeypatch):
    path, _, patch = stored
    monkeypatch.setattr(folder, "_write_values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        apply_to_folder(patch, path, output=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_tensor_is_in_memory_at_a_time(stored, monkeypatch):
    path, _, patch = stored
    read, alive, most = Checkpoint.tensor, [], []

    def counted(self, name):
        most.append(sum(reference() is not None for reference in alive))
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    apply_to_folder(patch, path)
    assert len(most) == len(patch.new)
    assert max(most) == 0


def test_other_models_are_refused_before_anything_is_written(stored, tmp_path):
    _, model, patch = stored
    moe(seed=1).model.to(torch.bfloat16).save_pretrained(tmp_path / "other")
    before = contents(tmp_path / "other")
    for change in (apply_to_folder, revert_folder):
        for output in (None, tmp_path / "out"):
            with pytest.raises(PatchError, match=r"neither as before the patch nor as after it.*--allow-mismatch"):
                change(patch, tmp_path / "other", output=output)
    assert contents(tmp_path / "other") == before
    assert not (tmp_path / "out").exists()
    outcome = apply_to_folder(patch, tmp_path / "other", output=tmp_path / "out", allow_mismatch=True)
    assert len(outcome.mismatches) == len(patch.new)
    patched = reloaded(model, tmp_path / "out")
    now = gather(patched, patch.selection)
    assert all(torch.equal(bits(now[name]), bits(patch.new[name])) for name in now)
    dense().model.save_pretrained(tmp_path / "dense")
    with pytest.raises(SelectionError, match="not among the"):
        apply_to_folder(patch, tmp_path / "dense", output=tmp_path / "x")


def test_a_folder_in_another_dtype(stored, tmp_path):
    path, model, _ = stored
    wide = reloaded(model, path).float()
    selection, changed = (whole := patch_of(wide)).selection, {name: v + 1e-5 for name, v in whole.new.items()}
    full = Patch.of(wide, selection, new=changed)  # as training in fp32 leaves it
    before, patch = contents(path), full.to(torch.bfloat16)
    outcome = apply_to_folder(full, path)
    assert outcome.num_rounded == patch.metadata["num_rounded"] > 0
    assert outcome.num_lost == patch.metadata["num_lost"]
    for again in (full, patch):
        assert not apply_to_folder(again, path)
    faint = Patch.of(wide, selection, new={name: v * (1 + 2**-20) for name, v in full.old.items()})
    assert apply_to_folder(faint, path, allow_mismatch=True).num_lost == faint.num_changed > 0
    apply_to_folder(full, path, allow_mismatch=True)
    now = gather(reloaded(model, path), patch.selection)
    assert all(torch.equal(bits(now[name]), bits(patch.new[name])) for name in now)
    assert revert_folder(full, path)
    assert contents(path) == before


def test_places_that_cannot_be_written_to(stored, tmp_path, monkeypatch):
    path, _, patch = stored
    before = contents(tmp_path)
    for output, message in (
        (path, "exists already"),
        (path / "inside", "inside the model's own folder"),
        (path / "config.json" / "x", "cannot be written|inside"),
    ):
        with pytest.raises(PatchError, match=message):
            apply_to_folder(patch, path, output=output)
    with pytest.raises(PatchError, match="only a folder of your own"):
        apply_to_folder(patch, "organism:moe")
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in path.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(PatchError, match=r"model-00001.* is a link"):
        apply_to_folder(patch, linked)
    assert apply_to_folder(patch, linked, output=tmp_path / "copy")
    assert not any(file.is_symlink() for file in (tmp_path / "copy").iterdir())
    shutil.rmtree(linked)
    shutil.rmtree(tmp_path / "copy")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    for output in (None, tmp_path / "out"):
        with pytest.raises(ResourceError, match=r"GB are needed, 0\.0 GB are free"):
            apply_to_folder(patch, path, output=output)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    assert apply_to_folder(patch, path, output=tmp_path / "empty")


def test_other_forms_of_the_weights_are_left_out(stored, tmp_path):
    path, _, patch = stored
    (path / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.safetensors", ".hidden", "notes.md"):
        (path / name).write_bytes(b"x")
    outcome = apply_to_folder(patch, path, output=tmp_path / "out")
    assert set(outcome.left_out) == {"pytorch_model.bin", "original/consolidated.safetensors"}
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"notes.md", "tokenizer.json", "config.json", "model.safetensors.index.json"} <= names
    assert not names & {"pytorch_model.bin", "original", ".hidden"}


def test_damaged_and_strange_folders(stored, tmp_path):
    path, _, patch = stored
    index = path / "model.safetensors.index.json"
    text = index.read_text()
    weight_map = json.loads(text)["weight_map"]
    missing = next(key for key in weight_map if "layers.0.mlp.experts.2.up_proj" in key)
    first = path / weight_map[missing]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"not a complete safetensors file \(expected \d+ bytes, found"):
        apply_to_folder(patch, path)
    kept = {key: value for key, value in load_file_from(whole, tmp_path).items() if key != missing}
    save_file(kept, first, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj (cannot be made|has shape)"):
        apply_to_folder(patch, path)
    first.write_bytes(whole)
    index.write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        apply_to_folder(patch, path)
    index.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        apply_to_folder(patch, path)
    index.write_text(text)
    (path / "model.safetensors").write_bytes(b"")  # which transformers takes, though there is an index
    with pytest.raises(ModelError, match=r"model\.safetensors: not a complete"):
        apply_to_folder(patch, path)
    (path / "model.safetensors").unlink()
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ModelError, match="quantised"):
        apply_to_folder(patch, path)


def load_file_from(raw, tmp_path):
    (tmp_path / "raw").write_bytes(raw)
    return load_file(tmp_path / "raw")


def test_a_tensor_that_is_not_in_the_files_is_an_error(tmp_path):
    target = dense()
    target.model.save_pretrained(tmp_path / "a")
    patch = patch_of(target.model)
    tensors = load_file(tmp_path / "a/model.safetensors")
    tensors["model.layers.0.strange.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"becomes 'model\.layers\.0\.mlp\.up_proj\.weight'.*strange\.up_proj"):
        apply_to_folder(patch, tmp_path / "a")


def test_tied_embeddings_are_changed_wherever_they_are_stored(tmp_path):
    target = dense(tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    selection = sl.Selection(coordinates={name: torch.arange(0, 90, 7)}, layout=target.layout, only_eligible=False)
    patch = Patch.of(target, selection, new={name: torch.arange(13.0)})
    target.model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    for change in (
        lambda: None,
        lambda: tensors.update({"lm_head.weight": tensors[name].clone()}),
        lambda: tensors.pop(name),
    ):
        change()
        save_file(tensors, path, metadata={"format": "pt"})
        before = path.read_bytes()
        assert apply_to_folder(patch, tmp_path / "a")
        for value in (v for k, v in load_file(path).items() if k in (name, "lm_head.weight")):
            assert torch.equal(value.flatten()[selection[name]], torch.arange(13.0))
        assert revert_folder(patch, tmp_path / "a")
        assert path.read_bytes() == before


def test_names_without_the_base_models_prefix_are_found(tmp_path):
    """The checkpoint of a base model, as some publish it; its head is tied."""
    target = dense(tie_word_embeddings=True)
    target.model.save_pretrained(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    tensors = {key.removeprefix("model."): value for key, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    patch = patch_of(target.model)
    assert apply_to_folder(patch, tmp_path / "a")
    patch.apply(target)
    assert same(everything(reloaded(target.model, tmp_path / "a")), everything(target.model))
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["layers.0.mlp.up_proj.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"several tensors in the files become model\.layers\.0\.mlp\.up_proj\.weight"):
        apply_to_folder(patch, tmp_path / "a")


# two checkpoints


def test_all_that_changed():
    patch = diff("organism:dense", "organism:dense-unaligned")
    model = sl.load("organism:dense", dtype="bfloat16").model
    assert patch.num_changed == patch.k == diff("organism:dense", "organism:dense-unaligned", largest=10**9).k
    assert patch.apply(model)
    assert same(everything(model), everything(sl.load("organism:dense-unaligned", dtype="bfloat16").model))
    assert patch.revert(sl.load("organism:dense-unaligned", dtype="bfloat16"))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_changed_most(kind):
    names = f"organism:{kind}", f"organism:{kind}-unaligned"
    first, second = (dict(sl.load(name, dtype="bfloat16").model.named_parameters()) for name in names)
    sizes = torch.cat([(second[name].float() - first[name].float()).abs().flatten() for name in first])
    patch = diff(*names, ratio=0.001)
    assert patch.k == int(0.001 * sizes.numel())
    taken = torch.cat([(patch.new[name].float() - patch.old[name].float()).abs() for name in patch.new])
    assert torch.equal(taken.sort().values, sizes.sort().values[-patch.k :])
    assert patch.before.tensors == {
        name: entry
        for name, entry in sl.load(names[0], dtype="bfloat16").fingerprint().tensors.items()
        if name in patch.new
    }
    assert patch.apply(sl.load(names[0], dtype="bfloat16"))
    assert diff(*names, largest=17).k == 17
    eligible = diff(*names, largest=500, only_eligible=True)
    assert set(eligible.new) <= set(eligible.selection.layout.eligible_tensors)


def test_checkpoints_that_cannot_be_compared(tmp_path):
    with pytest.raises(PatchError, match="hold the same weights"):
        diff("organism:dense", "organism:dense")
    other = sl.load("organism:dense", dtype="bfloat16")
    with torch.no_grad():
        other.model.model.norm.weight.mul_(2)
    other.model.save_pretrained(tmp_path)
    assert set(diff("organism:dense", tmp_path).new) == {"model.norm.weight"}
    with pytest.raises(PatchError, match="hold the same eligible weights, whatever else changed"):
        diff("organism:dense", tmp_path, only_eligible=True)
    with pytest.raises(
        PatchError, match=r"models of other shapes: \d+ tensors differ: .*\(\[.*\] against \[.*\]\).* more"
    ):
        diff("organism:dense", "organism:guard")
    with pytest.raises(PatchError, match="a ratio or a number"):
        diff("organism:dense", "organism:dense-unaligned", ratio=0.1, largest=3)
    with pytest.raises(PatchError, match="at least 1"):
        diff("organism:dense", "organism:dense-unaligned", largest=0)
    with pytest.raises(SelectionError, match="ratio"):
        diff("organism:dense", "organism:dense-unaligned", ratio=2)
    sl.load("organism:dense", dtype="float32").model.save_pretrained(tmp_path / "full")
    with pytest.raises(PatchError, match=r"bfloat16 in organism:dense and torch\.float32"):
        diff("organism:dense", tmp_path / "full")


def test_where_models_lie():
    assert local_folder("organism:dense") == Path(organism.resolve_model("dense"))
    with pytest.raises(ModelError, match="cannot be downloaded"):
        local_folder("nobody/nothing")


def test_the_largest_changes_of_strange_numbers(tmp_path):
    """Infinity that stays is no change; one that appears has no size, which is said; all changes still work."""
    target = dense()
    weight = target.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        weight[0, 0] = torch.inf
        weight[0, 1] = 0.0
        target.model.save_pretrained(tmp_path / "a")
        weight[0, 1] = -0.0
        weight[0, 2] += 1
        target.model.save_pretrained(tmp_path / "b")
        weight[0, 3] = torch.nan
        target.model.save_pretrained(tmp_path / "c")
    patch = diff(tmp_path / "a", tmp_path / "b", largest=5)
    assert {name: index.tolist() for name, index in patch.selection.coordinates.items()} == {
        "model.layers.0.mlp.up_proj.weight": [1, 2]
    }
    with pytest.raises(NumericalError, match=r"up_proj\.weight"):
        diff(tmp_path / "a", tmp_path / "c", largest=5)
    assert diff(tmp_path / "a", tmp_path / "c").k == 3
