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
        # The output layer of a language model is its embedding: the backbone's.
        self.assertEqual(head_parameters(tiny.gpt2(model_class="GPT2LMHeadModel")), {})


if __name__ == "__main__":
    unittest.main()
