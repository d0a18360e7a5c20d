"""Mean-pooled features are those of each text alone, and reading them changes nothing."""

import unittest

import tiny
import torch

from bitstack_nb.features import mean_pooled


def alone(model, ids: torch.Tensor) -> torch.Tensor:
    """The mean of a text's hidden states without any padding."""
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids[None]).last_hidden_state
    return hidden[0].mean(0)


class TestFeatures(unittest.TestCase):
    def test_padding_on_either_side_is_left_out(self):
        for build in (tiny.bert, tiny.distilbert, tiny.gpt2):
            for left in (False, True) if build is tiny.gpt2 else (False,):
                model = build().train()
                ids = [torch.tensor([5, 9, 7]), torch.tensor([4, 3, 8, 6, 2])]
                padding = torch.zeros(2, dtype=torch.int64)
                short = torch.cat([padding, ids[0]] if left else [ids[0], padding])
                rows = torch.stack([short, ids[1]])
                mask = (rows != 0).long()
                batch = {"input_ids": rows, "attention_mask": mask, "labels": torch.zeros(2)}
                if left:
                    batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
                state = torch.get_rng_state()
                found = mean_pooled(model, [batch])
                self.assertTrue(model.training and torch.equal(torch.get_rng_state(), state))
                self.assertEqual((found.shape, found.dtype), ((2, 16), torch.float32))
                self.assertFalse(found.requires_grad)
                for row, own in enumerate(ids):
                    torch.testing.assert_close(found[row], alone(model, own))
                torch.testing.assert_close(mean_pooled(model.base_model, [batch]), found)

    def test_no_batch_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "no batch"):
            mean_pooled(tiny.bert(), [])


if __name__ == "__main__":
    unittest.main()
