"""eligible.py: heads, embeddings and the final norm are left out, by canonical names."""

import unittest

import tiny
import torch
from torch import nn

from bitstack_nb import BitStack
from bitstack_nb.eligible import head_parameters


class Eligibility(unittest.TestCase):
    def test_heads_embeddings_and_final_norm_stay_free(self):
        for name, (build, _) in tiny.ARCHITECTURES.items():
            with self.subTest(name):
                model = build()
                expected = tiny.expected_eligible(name, model)
                self.assertGreater(len(expected), 8)
                masks = BitStack(model).masks
                self.assertEqual(list(masks), expected)
                for key, parameter in model.named_parameters():
                    if key in masks:
                        self.assertEqual(masks[key].shape, parameter.shape)
                        self.assertFalse(masks[key].any())

    def test_gpt2_default_is_the_published_list(self):
        published = BitStack(tiny.gpt2(), exclude=["score", "wte", "wpe", "ln_f"])
        self.assertEqual(list(BitStack(tiny.gpt2()).masks), list(published.masks))

    def test_exclude_is_by_part_of_the_name(self):
        stack = BitStack(tiny.plain(), exclude=["blocks.1", "norm", "classifier"])
        names = [n for n, _ in tiny.plain().named_parameters()]
        kept = [n for n in names if not any(x in n for x in ("blocks.1", "norm", "classifier"))]
        self.assertEqual(list(stack.masks), kept)
        self.assertIn("embed.weight", kept)
        self.assertEqual(list(BitStack(tiny.plain(), exclude=[]).masks), names)

    def test_exclude_may_be_any_iterable(self):
        expected = list(BitStack(tiny.plain(), exclude=["norm", "embed"]).masks)
        for names in (("norm", "embed"), iter(["norm", "embed"])):
            with self.subTest(type(names)):
                self.assertEqual(list(BitStack(tiny.plain(), exclude=names).masks), expected)

    def test_frozen_and_integer_parameters_are_not_eligible(self):
        model = tiny.plain()
        model.blocks[0].up.weight.requires_grad_(False)
        model.blocks[0].steps = nn.Parameter(torch.arange(4), requires_grad=False)
        names = list(BitStack(model).masks)
        self.assertNotIn("blocks.0.up.weight", names)
        self.assertNotIn("blocks.0.steps", names)
        self.assertIn("blocks.0.down.weight", names)

    def test_names_are_canonical(self):
        expected = list(BitStack(tiny.plain()).masks)
        parallel = nn.DataParallel(tiny.plain())
        block_by_block = tiny.plain()
        for i, block in enumerate(block_by_block.blocks):
            block_by_block.blocks[i] = torch.compile(block, backend="eager")
        for name, wrapped in {
            "compiled": torch.compile(tiny.plain(), backend="eager"),
            "parallel": parallel,
            "block by block": block_by_block,
            "both": torch.compile(parallel, backend="eager"),
        }.items():
            with self.subTest(name):
                self.assertEqual(list(BitStack(wrapped).masks), expected)

    def test_a_language_model_tied_to_its_embedding(self):
        masks = BitStack(tiny.gpt2(model_class="GPT2LMHeadModel")).masks
        self.assertTrue(all(name.startswith("transformer.h.") for name in masks))

    def test_heads(self):
        for architecture, heads in {
            "plain": {"classifier.weight", "classifier.bias"},
            "gpt2": {"score.weight"},
            "distilbert": {
                f"{part}.{name}"
                for part in ("pre_classifier", "classifier")
                for name in ("weight", "bias")
            },
        }.items():
            with self.subTest(architecture):
                model = tiny.ARCHITECTURES[architecture][0]()
                self.assertEqual(head_parameters(model).keys(), heads)
        for name in (
            *("classifiers", "pre_classifier", "heads", "mlp_head", "task_scores", "Logits"),
            *("out", "output_layer", "last", "last_linear", "final_layer", "fc", "cls"),
            *("head1", "classifier_2", "head_of_topics"),
        ):
            with self.subTest(name), self.assertNoLogs("bitstack_nb", "WARNING"):
                model = tiny.renamed(name)
                self.assertEqual(head_parameters(model).keys(), {f"{name}.weight", f"{name}.bias"})
                self.assertEqual(
                    list(BitStack(model).masks), tiny.expected_eligible("plain", model)
                )
        # The output layer of a language model is its embedding: the backbone's.
        self.assertEqual(head_parameters(tiny.gpt2(model_class="GPT2LMHeadModel")), {})

    def test_heads_inside_wrappers(self):
        for name, (build, _) in tiny.ARCHITECTURES.items():
            model = build()
            inside = [f"inner.{key}" for key in tiny.expected_eligible(name, model)]
            for wrap in (
                tiny.Wrapper,
                lambda model: tiny.Wrapper(torch.compile(model, backend="eager")),
                lambda model: nn.ModuleDict({"inner": model, "metric": nn.Identity()}),
            ):
                with self.subTest(name), self.assertNoLogs("bitstack_nb", "WARNING"):
                    self.assertEqual(list(BitStack(wrap(model)).masks), inside)
        whole = nn.ModuleDict({"classifier": tiny.Wrapper(tiny.bert())})
        self.assertTrue(
            all("bert.encoder" in name or "pooler" in name for name in BitStack(whole).masks)
        )

    def test_the_last_layer_where_no_name_tells(self):
        mlp = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Dropout())
        late_norm = tiny.renamed("answers")
        late_norm.norm = late_norm._modules.pop("norm")
        for layer, model in {
            "labeller": tiny.renamed("labeller"),
            "first": tiny.renamed("first", first=True),
            "answers": late_norm,
            "2": mlp,
            "inner.2": nn.ModuleDict({"inner": mlp}),
            "decide.2": nn.ModuleDict({"encode": nn.Linear(4, 4), "decide": mlp}),
            "1": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)]),
        }.items():
            with self.subTest(layer):
                with self.assertLogs("bitstack_nb", "WARNING") as logs:
                    masks = BitStack(model).masks
                self.assertRegex(logs.output[0], f"last layer '{layer}'.*exclude=")
                self.assertEqual(
                    head_parameters(model).keys(), {f"{layer}.weight", f"{layer}.bias"}
                )
                self.assertFalse([name for name in masks if name.startswith(f"{layer}.")])
                with self.assertNoLogs("bitstack_nb", "WARNING"):
                    BitStack(model, exclude=[layer])

    def test_several_heads(self):
        """A wrapper's own beside that of the model in it, and last layers of one input."""
        answers = {"topic": nn.Linear(4, 3), "mood": nn.Linear(4, 2)}
        beside = nn.ModuleDict({"model": tiny.bert(), "topic_head": nn.Linear(16, 2)})
        for expected, model in {
            ("model.classifier", "topic_head"): beside,
            ("head_a", "head_b"): nn.ModuleDict(
                {"body": nn.Linear(4, 4), "head_a": nn.Linear(4, 2), "head_b": nn.Linear(4, 2)}
            ),
            ("topic", "mood"): nn.ModuleDict({"body": nn.Linear(4, 4), **answers}),
            ("tasks.topic", "tasks.mood"): nn.ModuleDict(
                {"body": nn.Linear(4, 4), "tasks": nn.ModuleDict(answers)}
            ),
            ("tasks.0", "tasks.1"): nn.ModuleDict(
                {"body": nn.Linear(4, 4), "tasks": nn.ModuleList(answers.values())}
            ),
        }.items():
            with self.subTest(expected):
                names = [f"{path}.{own}" for path in expected for own in ("weight", "bias")]
                self.assertEqual(list(head_parameters(model)), names)
        with self.assertLogs("bitstack_nb", "WARNING") as logs:
            BitStack(model)
        self.assertIn("the last layers 'tasks.0', 'tasks.1' are taken for it", logs.output[0])

    def test_no_head_is_said(self):
        tied = tiny.plain()
        del tied.classifier
        for model in (tied, tiny.gpt2(model_class="GPT2Model"), tiny.bert().bert):
            with self.assertLogs("bitstack_nb", "WARNING") as logs:
                BitStack(model)
            self.assertRegex(
                logs.output[0], f"{type(model).__name__} has .*none is found.*exclude="
            )

    def test_blocks_with_norm_or_embed_in_their_names(self):
        class NormFormer(tiny.Plain):
            pass

        class EmbedMixer(tiny.Block):
            pass

        def embedder():
            model = nn.ModuleDict({"embedder": tiny.plain(), "classifier": nn.Linear(3, 2)})
            model.embedder.norm = nn.Sequential(EmbedMixer(tiny.WIDTH))
            return model

        prelayernorm = tiny._classifier(
            "RobertaPreLayerNormConfig",
            "RobertaPreLayerNormForSequenceClassification",
            0,
            **tiny._ENCODER,
        )
        for model, starts in {
            NormFormer(): ("blocks.",),
            prelayernorm: ("roberta_prelayernorm.encoder.layer.",),
            embedder(): ("embedder.blocks.", "embedder.norm.0.", "embedder.classifier."),
        }.items():
            expected = [name for name, _ in model.named_parameters() if name.startswith(starts)]
            self.assertEqual(list(BitStack(model).masks), expected)

    def test_embeddings_of_other_kinds(self):
        class Patches(nn.Module):
            def __init__(self):
                super().__init__()
                self.pos_embed = nn.Parameter(torch.ones(4))
                self.words = nn.EmbeddingBag(4, 4)
                self.embed_proj = nn.Linear(4, 4)
                self.mix = nn.Linear(4, 4)
                self.head = nn.Linear(4, 2)

        self.assertEqual(list(BitStack(Patches()).masks), ["mix.weight", "mix.bias"])


if __name__ == "__main__":
    unittest.main()
