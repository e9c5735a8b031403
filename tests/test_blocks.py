"""Large blocks that are used again: never while a tensor holds them, always when none does, and not kept for ever."""

import threading

import pytest
import torch

from fldist.blocks import ALIGNMENT, IDLE, SMALL, Blocks

N = SMALL // 4  # float32 of a block that is kept


def test_a_block_nobody_holds_is_given_out_again():
    blocks = Blocks()
    block = blocks.empty(N)
    address = block.data_ptr()
    del block
    assert blocks.empty(N).data_ptr() == address
    assert blocks.empty((N // 2, 2), torch.float32).data_ptr() == address  # by size, whatever the shape


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: t,
        lambda t: t[5:10],
        lambda t: t.view(torch.uint8).reshape(2, -1),
        lambda t: t.numpy()[3:4],
        lambda t: t.detach(),
        lambda t: torch.nn.Parameter(t),
        lambda t: t.untyped_storage(),
    ],
    ids=["itself", "slice", "bytes", "array", "detached", "parameter", "storage"],
)
def test_what_shares_its_memory_keeps_it(holder):
    blocks = Blocks()
    block = blocks.empty(N)
    address = block.data_ptr()
    held = holder(block)
    del block
    other = blocks.empty(N)
    assert other.data_ptr() != address
    del held
    assert blocks.empty(N).data_ptr() == address


def test_blocks_of_other_sizes_are_other_blocks():
    blocks = Blocks()
    address = blocks.empty(N).data_ptr()
    larger = blocks.empty(N + 1)
    assert larger.data_ptr() != address
    assert larger.numel() == N + 1


def test_small_ones_are_plain_tensors():
    blocks = Blocks()
    small = blocks.empty(N - 1)
    assert blocks._kept == []
    assert small.shape == (N - 1,)


def test_contents_types_and_boundaries():
    blocks = Blocks()
    dirty = blocks.empty(N, torch.int64).fill_(7)
    assert dirty.data_ptr() % ALIGNMENT == 0
    del dirty
    clean = blocks.zeros(N, torch.int64)
    assert not clean.any()
    source = torch.randn(N)
    copied = blocks.copy(source)
    assert torch.equal(copied, source)
    assert copied.data_ptr() != source.data_ptr()
    assert blocks.empty((), torch.float32).shape == ()


def test_what_is_not_needed_any_more_goes_back():
    blocks = Blocks()
    held = [blocks.empty(N) for _ in range(3)]
    del held
    assert len(blocks._kept) == 3
    for _ in range(IDLE + 1):
        blocks.empty(N)
    assert len(blocks._kept) == 1


def test_threads_never_share_a_block():
    blocks = Blocks()
    failures = []

    def work(number: int) -> None:
        for _ in range(200):
            block = blocks.empty(N).fill_(number)
            if int(block[0]) != number or int(block[-1]) != number:
                failures.append(number)
            del block

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
