"""What notebooks do to a stack: interrupts, cells run twice or out of order, copies, casts, moves.

The guarantee holds through it, or an error says why not.
"""

import copy
import gc
import sys
import tempfile
import unittest
from contextlib import contextmanager

import tiny
import torch
from cases import ADAMW, LockedCase, RecallCase, trainer_of
from transformers import TrainerCallback

from bitstack_nb import BitStack, ExactRecall
from bitstack_nb.guard import LockedWeightsMoved


@contextmanager
def interrupted(after: int | None = None):
    """Ctrl-C when torch's functions have returned so often; yields how often they did.

    Python raises a KeyboardInterrupt that came while C code ran when that returns.
    """
    calls = [0]

    def count(frame, event, function):
        owner = getattr(function, "__self__", None)
        torchs = isinstance(owner, torch.Tensor) or "torch" in getattr(owner, "__module__", "")
        if event == "c_return" and torchs:
            calls[0] += 1
            if calls[0] == after:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        yield calls
    except KeyboardInterrupt:
        if calls[0] != after:
            raise
    finally:
        sys.setprofile(None)


class Interrupted(LockedCase):
    """The kernel is interrupted, and the next cell is run."""

    def moments(self, call, count=12) -> range:
        """Moments spread over all that a call does."""
        with interrupted() as calls:
            call()
        self.assertGreater(calls[0], count)
        return range(1, calls[0] + 1, max(1, calls[0] // count))

    def test_in_a_training_step(self):
        """In the optimizer some weights have moved and are not put back yet: verify says so."""
        model, optimizer, stack = self.locked_model()
        told = 0
        for moment in self.moments(lambda: tiny.train(model, optimizer, tiny.batches(1, seed=1))):
            with self.subTest(moment):
                before = tiny.snapshot(model)
                with interrupted(moment):
                    tiny.train(model, optimizer, tiny.batches(1, seed=1))
                try:
                    stack.verify()
                except LockedWeightsMoved as error:
                    told += 1
                    self.assertRegex(str(error), r"restore\(\)")
                if moment % 2:  # put back by hand, or by the next step
                    stack.restore()
                    self.assertEqual(stack.verify(), 0)
                tiny.train(model, optimizer, tiny.batches(1, seed=2))
                self.assert_held(stack, model, before)
        self.assertGreater(told, 0)

    def test_in_update(self):
        """Nothing has changed, or all: doing it again gives the masks of doing it once."""
        once = self.locked_model()[2]
        once.update(tiny.batches(2, seed=1))
        for moment in self.moments(lambda: self.locked_model()[2].update(tiny.batches(2, seed=1))):
            with self.subTest(moment):
                model, optimizer, stack = self.locked_model()
                before = tiny.snapshot(model)
                with interrupted(moment):
                    stack.update(tiny.batches(2, seed=1))
                self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
                self.assertEqual(stack.verify(), 0)
                stack.update(tiny.batches(2, seed=1))
                for name, mask in once.masks.items():
                    self.assertTrue(torch.equal(stack.masks[name], mask), name)
                tiny.train(model, optimizer, tiny.batches(1, seed=2))
                self.assert_held(stack, model, before)

    def test_in_a_trainer(self):
        class Stop(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                if state.global_step == 2:
                    raise KeyboardInterrupt

        model, stop = tiny.gpt2(), Stop()
        stack = BitStack(model, 0.3)
        stack.update(tiny.batches(2, seed=0))
        before = tiny.snapshot(model)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(model, folder, [stack.callback(), stop])
            with self.assertRaises(KeyboardInterrupt):
                trainer.train()
            self.assertEqual(stack.verify(), 0)
            trainer.remove_callback(stop)
            trainer.train()
        self.assert_held(stack, model, before)
        self.assertGreater(stack.update(tiny.batches(2, seed=1))["locked"], 0)


class InterruptedRecall(RecallCase):
    moments = Interrupted.moments

    def setUp(self):
        """Two closed tasks."""
        self.model, self.tasks = self.trained(tasks=2)

    def begin(self):
        self.tasks.begin("2", loader=tiny.batches(2, seed=2), head_steps=2)

    def open(self):
        """A third task, trained halfway."""
        self.begin()
        self.optimizer = ADAMW(self.tasks.parameters())
        tiny.train(self.model, self.optimizer, tiny.batches(2, seed=2))

    def close(self):
        tiny.train(self.model, self.optimizer, tiny.batches(1, seed=3))
        self.tasks.close()
        self.after.append(tiny.snapshot(self.model))
        self.assert_recalls(self.model, self.tasks)

    def test_in_a_switch(self):
        """On the way in or out: the present task stands as it was, and trains on."""
        self.open()
        present = tiny.snapshot(self.model)

        def switch():
            with self.tasks.using("0"):
                pass

        for moment in self.moments(switch):
            with self.subTest(moment):
                with interrupted(moment):
                    switch()
                self.assert_bits(self.model, present)
                self.assertEqual(self.tasks.verify(), 0)
        self.close()

    def test_in_begin(self):
        """Nothing has changed, and begin() can be called again."""

        def begin():
            self.begin()
            self.tasks.abandon()
            self.tasks.switch("1")

        before = tiny.snapshot(self.model)
        for moment in self.moments(begin, 20):
            with self.subTest(moment):
                with interrupted(moment):
                    begin()
                if self.tasks._open:  # the interrupt came later than begin()
                    self.tasks.abandon()
                self.assert_bits(self.tasks.switch("1"), before)
                self.assertEqual(self.tasks.verify(), 0)
        self.open()
        self.close()

    def test_in_close(self):
        """The task is open or closed, and close() can be called again."""
        self.open()
        moments = self.moments(self.tasks.close)
        for moment in moments:
            with self.subTest(moment):
                self.setUp()
                self.open()
                present = tiny.snapshot(self.model)
                with interrupted(moment):
                    self.tasks.close()
                if self.tasks._open:
                    self.tasks.close()
                self.after.append(present)
                self.assert_recalls(self.model, self.tasks)

    def test_in_a_training_step(self):
        self.open()
        step = lambda: tiny.train(self.model, self.optimizer, tiny.batches(1, seed=2))  # noqa: E731
        for moment in self.moments(step):
            with interrupted(moment):
                step()
        self.close()


class Reruns(LockedCase):
    """Cells run twice or out of order, and what they leave behind."""

    def test_update_twice(self):
        """The same data choose the same entries: the second time none is added (budget union)."""
        model, optimizer, stack = self.locked_model()
        locked = stack.stats()["locked"]
        self.assertEqual(stack.update(tiny.batches(2, seed=0))["locked"], locked)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assert_held(stack, model, before)

    def test_a_stack_that_is_garbage_goes_on_guarding(self):
        model, optimizer, stack = self.locked_model()
        masks, before = dict(stack.masks), tiny.snapshot(model)
        del stack
        gc.collect()
        tiny.train(model, optimizer, tiny.batches(3, seed=1))
        changed = tiny.changed(model, before)
        for name, mask in masks.items():
            self.assertFalse(changed[name][mask].any(), name)
            self.assertTrue(changed[name][~mask].any() or mask.all(), name)
            self.assertFalse(model.get_parameter(name).grad[mask].any())

    def test_two_stacks_on_one_model(self):
        """Each holds its own; neither hides from the other what it measures."""
        model, optimizer, first = self.locked_model()
        twin = BitStack(tiny.unhooked_copy(model), 0.1)
        twin.update(tiny.batches(2, seed=1))
        second = BitStack(model, 0.1)
        second.update(tiny.batches(2, seed=1))
        for name, mask in twin.masks.items():
            self.assertTrue(torch.equal(second.masks[name], mask), name)
        second.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(3, seed=2))
        for stack in (first, second):
            self.assert_held(stack, model, before, moving=0.3)

    def test_a_cell_that_makes_a_stack_is_run_again(self):
        """The first stack is out of reach: the second says so, and takes it off the model."""
        model, optimizer, stack = self.locked_model()
        locked = f"{stack.stats()['locked']:,}"
        mask = stack.masks["blocks.0.up.weight"]
        del stack
        with self.assertLogs("bitstack_nb", "WARNING") as said:
            stack = BitStack(model, 0.1)
        self.assertRegex(said.output[0], rf"another BitStack.* {locked} .*detach\(others=True\)")
        stack.update(tiny.batches(2, seed=1))
        stack.detach(others=True)
        with self.assertNoLogs("bitstack_nb", "WARNING"):
            BitStack(model)
        stack.attach(optimizer)
        before = tiny.snapshot(model)
        tiny.train(model, optimizer, tiny.batches(3, seed=2))
        self.assert_held(stack, model, before)
        freed = mask & ~stack.masks["blocks.0.up.weight"]
        moved = tiny.changed(model, before)["blocks.0.up.weight"]
        self.assertGreater(freed.sum(), 0)
        self.assertTrue(moved[freed].all())

    def test_exact_recall_on_a_model_with_locks(self):
        """Own weights that are locked would not train."""
        model = self.locked_model()[0]
        with self.assertRaisesRegex(RuntimeError, r"a BitStack has hooks.*detach\(\)"):
            ExactRecall(model)
        BitStack(model).detach(others=True)
        ExactRecall(model).begin("task")


class Changed(LockedCase):
    """The model is cast, moved or copied after locking."""

    def test_a_cast_is_refused_by_the_next_step(self):
        for cast in (torch.bfloat16, torch.float16, torch.float64):
            with self.subTest(cast):
                model, optimizer, stack = self.locked_model()
                model.to(cast)
                for call in (
                    lambda m=model, o=optimizer: tiny.train(m, o, tiny.batches(1, seed=1)),
                    lambda s=stack: s.update(tiny.batches(1, seed=1)),
                    stack.verify,
                ):
                    with self.assertRaisesRegex(RuntimeError, "locked as torch.float32.*cast"):
                        call()

    def test_a_cast_and_back_is_seen_and_can_be_undone(self):
        model, optimizer, stack = self.locked_model()
        before = tiny.snapshot(model)
        model.to(torch.bfloat16).to(torch.float32)
        with self.assertRaises(LockedWeightsMoved):
            stack.verify()
        tiny.train(model, optimizer, tiny.batches(1, seed=1))
        self.assert_held(stack, model, before)

    def test_a_move_to_a_device_without_values_is_refused(self):
        model, _, stack = self.locked_model()
        state = stack.state_dict()
        model.to("meta")
        for call in (
            stack.verify,
            lambda: stack.update(tiny.batches(1, seed=1)),
            lambda: stack.attach(ADAMW(model.parameters())),
        ):
            with self.assertRaisesRegex(RuntimeError, "no longer holds blocks"):
                call()
        self.assertEqual(sum(map(len, state["values"].values())), stack.stats()["locked"])

    @unittest.skipUnless(torch.cuda.is_available(), "needs a GPU")
    def test_a_move_to_a_gpu_and_back(self):
        model, _, stack = self.locked_model()
        before = tiny.snapshot(model)
        for device in ("cuda", "cpu"):
            model.to(device)
            optimizer = ADAMW(model.parameters())
            stack.attach(optimizer)
            loader = [{k: v.to(device) for k, v in b.items()} for b in tiny.batches(2, seed=1)]
            tiny.train(model, optimizer, loader)
            self.assertEqual(stack.verify(), 0)
        self.assert_held(stack, model, before)

    def test_a_copy_of_the_model_is_another_model(self):
        """It trains freely, and nothing of that reaches the guarded one."""
        model, optimizer, stack = self.locked_model()
        before, twin = tiny.snapshot(model), copy.deepcopy(model)
        theirs = ADAMW(twin.parameters())
        with self.assertRaisesRegex(ValueError, "holds no parameter of the stack's model"):
            stack.attach(theirs)
        tiny.train(twin, theirs, tiny.batches(2, seed=1))
        self.assertTrue(tiny.changed(twin, before)["blocks.0.up.weight"].all())
        self.assertFalse(any(c.any() for c in tiny.changed(model, before).values()))
        tiny.train(model, optimizer, tiny.batches(2, seed=1))
        self.assert_held(stack, model, before)

    def test_a_copy_of_the_stack_guards_a_copy_of_the_model(self):
        model, optimizer, stack = self.locked_model()
        twin_stack, twin = copy.deepcopy((stack, model))
        theirs = ADAMW(twin.parameters())
        twin_stack.attach(theirs)
        before = tiny.snapshot(model)
        for each, its_model, steps in ((twin_stack, twin, theirs), (stack, model, optimizer)):
            tiny.train(its_model, steps, tiny.batches(2, seed=1))
            self.assert_held(each, its_model, before)
            for name, mask in each.masks.items():
                self.assertFalse(its_model.get_parameter(name).grad[mask].any(), name)
        self.assertGreater(twin_stack.update(tiny.batches(2, seed=3))["locked"], 0)
        self.assertEqual(stack.verify(), 0)


if __name__ == "__main__":
    unittest.main()
