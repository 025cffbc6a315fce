"""An image's bucket holds it and depends on its size alone; each image is in one chunk; only last chunks are filled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dino_dist.data.crops.buckets import SIDES_PX, SMALL_PX, Bucket, bucket_of, plan_chunks

SIZES = st.tuples(st.integers(1, 9000), st.integers(1, 9000))


@given(SIZES)
def test_a_bucket_holds_its_images_and_is_not_much_larger(size: tuple[int, int]) -> None:
    bucket = bucket_of(*size)
    for length, padded in zip(size, bucket, strict=True):
        assert length <= padded
        assert padded % 16 == 0
        assert padded <= max(2 * length, SIDES_PX[0]) or length > SIDES_PX[-1]
    assert 1 <= bucket.chunk_images <= 32
    assert bucket.is_listed == (max(size) <= SIDES_PX[-1])


def test_published_sizes() -> None:
    assert bucket_of(375, 500) == bucket_of(512, 512) == bucket_of(1, SMALL_PX + 1) == Bucket(512, 512)
    assert bucket_of(8, 8) == bucket_of(SMALL_PX, SMALL_PX) == Bucket(SMALL_PX, SMALL_PX)
    assert bucket_of(4000, 300) == Bucket(4096, 512)
    assert bucket_of(300, 4097) == Bucket(512, 8192)
    chunks = [Bucket(512, 512), Bucket(512, 1024), Bucket(1024, 1024), Bucket(2048, 2048), Bucket(8192, 8192)]
    assert [bucket.chunk_images for bucket in chunks] == [32, 8, 4, 1, 1]


@given(st.lists(SIZES, max_size=100))
def test_each_image_is_in_one_chunk_of_its_bucket(sizes: list[tuple[int, int]]) -> None:
    chunks = list(plan_chunks(sizes))
    assert sorted(image for chunk in chunks for image in chunk.images) == list(range(len(sizes)))
    for bucket, images in chunks:
        assert 1 <= len(images) <= bucket.chunk_images
        assert images == sorted(images)
        assert {bucket_of(*sizes[image]) for image in images} == {bucket}
    not_full = [chunk.bucket for chunk in chunks if len(chunk.images) < chunk.bucket.chunk_images]
    assert len(not_full) == len(set(not_full)), "only the last chunk of a bucket may be filled up"
