"""An image pipeline in two stages: photos are made small, then each album's contact sheet is drawn anew.

The naive version writes the small image where it is wanted and then tells the next stage: killed in between it leaves
half an image under its final name, or a whole one that no sheet ever shows. Here a file is written beside its name and
renamed, so that it is whole or not there, and doing it twice does no harm; the message to the next stage leaves with
the acknowledgement, `tx.send`, so that it leaves exactly once. A photo whose upload is under way is tried again until
it is whole; one that never is becomes a dead letter.

    python -m examples.images
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps

import shardq
from examples.common import GROUP, LEASE_S, check, finished, run, unique, until, workers

ALBUMS, PHOTOS = 4, 12
SMALL = (120, 80)
photos = Path(os.environ.get("FOLDER", "."), "photos")
smalls = Path(os.environ.get("FOLDER", "."), "small")
queue_name = os.environ.get("QUEUE", "unset")

resizer = shardq.Worker(
    queue_name,
    group=GROUP,
    lease=LEASE_S,
    concurrency=2,
    ordering="none",  # an album's other photos need not wait for one that is tried again
    retry=shardq.Retry(attempts=6, base=0.1, factor=2),
)
drawer = shardq.Worker(f"{queue_name}-sheets", group=GROUP, lease=LEASE_S, concurrency=2)
sheets: list[shardq.Queue] = []


@resizer.on_start
async def find_the_next_queue(client: shardq.Client) -> None:
    sheets.append(await client.queue(f"{queue_name}-sheets"))


@resizer.handler
def resize(message: shardq.Message) -> None:  # a plain function: it runs in a thread, and Pillow keeps nobody waiting
    make_small(message.value)
    with message.atomic() as tx:
        tx.send(sheets[0], message.value, key=message.key)


@drawer.batch_handler
def draw(messages: Sequence[shardq.Message]) -> None:
    for album in {message.key for message in messages}:
        save_whole(contact_sheet(smalls, str(album)), smalls / f"{album!s}.png")


def make_small(name: str) -> None:
    with Image.open(photos / name) as photo:  # OSError where the photo is not whole
        save_whole(ImageOps.fit(photo, SMALL), smalls / name)


def contact_sheet(folder: Path, album: str) -> Image.Image:
    """All the small images of an album that are there."""
    sheet = Image.new("RGB", (5 * SMALL[0], -(-PHOTOS // 5) * SMALL[1]))
    for small in folder.glob(f"{album}-*.jpg"):
        number = int(small.stem.rpartition("-")[2])
        with Image.open(small) as image:
            sheet.paste(image, (number % 5 * SMALL[0], number // 5 * SMALL[1]))
    return sheet


def save_whole(image: Image.Image, path: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    image.save(part, "PNG" if path.suffix == ".png" else "JPEG")
    part.replace(path)


def make_photos(photos: Path, smalls: Path) -> dict[str, str]:
    """Makes both folders, and photos in the first; returns the album of each."""
    photos.mkdir()
    smalls.mkdir()
    made = {f"album{album}-{number}.jpg": f"album{album}" for album in range(ALBUMS) for number in range(PHOTOS)}
    for count, (name, _) in enumerate(made.items()):
        grey = Image.linear_gradient("L").rotate(count * 6).resize((600, 400))
        ImageOps.colorize(grey, "black", f"hsl({count * 360 // len(made)}, 80%, 60%)").save(photos / name)
    return made


def done(smalls: Path) -> list[Path]:
    return list(smalls.glob("*.jpg"))


def is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == SMALL
    except OSError:
        return False


async def main(url: str) -> None:
    name = unique("photos")
    with TemporaryDirectory() as base:
        photos, smalls = Path(base, "photos"), Path(base, "small")
        album_of = make_photos(photos, smalls)
        late, broken = photos / "album0-3.jpg", photos / "album1-7.jpg"
        whole = late.read_bytes()
        for photo in (late, broken):
            photo.write_bytes(photo.read_bytes()[:4000])
        async with shardq.connect(url) as client:
            queue, next_queue = await client.queue(name, shards=6), await client.queue(f"{name}-sheets", shards=6)
            for each in (queue, next_queue):
                await each.open_group(GROUP)
            async with queue.producer() as producer:
                late_job = await producer.submit(late.name, key=album_of[late.name])
                await producer.send_many((album, photo) for photo, album in album_of.items() if photo != late.name)
            environment = {"QUEUE": name, "FOLDER": base}
            with (
                workers(url, "examples.images:resizer", 2, **environment) as resizers,
                workers(url, "examples.images:drawer", 1, **environment),
            ):

                async def third() -> bool:
                    return len(done(smalls)) > len(album_of) // 3

                async def late_was_tried() -> bool:
                    return (await late_job.state()).status == "retrying"

                await until(late_was_tried, "the photo whose upload is under way to be tried")
                print(f"uploaded the rest of {late.name}: {(await late_job.state()).error}")
                late.write_bytes(whole)
                await until(third, "a third of the photos")
                resizers.kill_one()
                print(f"killed a worker after {len(done(smalls))} of {len(album_of)} photos")
                await until(lambda: finished(queue), "the photos")
                await until(lambda: finished(next_queue), "the contact sheets")
            dead = [letter.value async for letter in queue.dead_letters(GROUP)]
            handed_on = sum(shard.appended for shard in (await next_queue.counters()).values())
        good = [photo for photo in album_of if photo != broken.name]
        check(all(is_whole(smalls / photo) for photo in good), f"{len(good)} photos are small, none is half written")
        check(dead == [broken.name], f"the broken one, {broken.name}, is a dead letter")
        check(handed_on == len(good), "each was handed to the next stage exactly once")
        same = [
            Image.open(smalls / f"{album}.png").tobytes() == contact_sheet(smalls, album).tobytes()
            for album in set(album_of.values())
        ]
        check(all(same), f"the {ALBUMS} contact sheets show them all")


if __name__ == "__main__":
    run(main, __doc__)
