"""Find near-duplicates by the embeddings of a model: copies that were compressed, darkened, shrunk or mirrored.

pip install ".[batch]" scikit-learn && python examples/near_duplicates.py [FOLDER]

Photographs of the folder are cut into tiles, and a quarter of them gets a changed copy, so the right answer is known.
With a folder of your own, leave that out and read the pairs.
"""

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance, ImageOps
from sklearn.neighbors import NearestNeighbors

import convmixer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "images")
photographs = sorted(p for p in parser.parse_args().folder.iterdir() if p.suffix in (".jpg", ".png"))

TILE = 64  # pixels
CHANGES = {
    "compressed": lambda image: image,
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "smaller": lambda image: image.resize((40, 40)),
    "mirrored": ImageOps.mirror,
}

with tempfile.TemporaryDirectory() as temporary:
    tiles = Path(temporary, "tiles")
    tiles.mkdir()
    rng = random.Random(0)
    for photograph in photographs:
        image = Image.open(photograph).convert("RGB")
        for x in range(0, image.width - TILE + 1, TILE):
            for y in range(0, image.height - TILE + 1, TILE):
                tile, name = image.crop((x, y, x + TILE, y + TILE)), f"{photograph.stem}-{x}-{y}"
                if np.asarray(tile).std() < 20:  # sky and walls: such tiles are alike by themselves
                    continue
                tile.save(tiles / f"{name}.png")
                if rng.random() < 0.25:
                    change = rng.choice(list(CHANGES))
                    CHANGES[change](tile).save(tiles / f"{name}.{change}.jpg", quality=60)

    model = convmixer.create_model("convmixer_256_8", pretrained=True)
    convmixer.predict_dataset(model, tiles, Path(temporary, "embeddings"), embed=True, workers=0)
    table = pq.read_table(Path(temporary, "embeddings"))

names = np.array([name.split(".")[0] for name in table["image"].to_pylist()])
kinds = np.array([name.split(".")[1] for name in table["image"].to_pylist()])
vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
distances, neighbours = NearestNeighbors(n_neighbors=2, metric="cosine").fit(vectors).kneighbors(vectors)
nearest = neighbours[:, 1]  # the first one is the image itself
for change in CHANGES:
    found = names[nearest[kinds == change]] == names[kinds == change]
    print(f"{change:10} nearest neighbour of {found.sum():3} of {len(found):3} copies is the original")
mutual = [(i, j) for i, j in enumerate(nearest) if i < j and nearest[j] == i and distances[i, 1] < 0.05]
right = sum(names[i] == names[j] for i, j in mutual)
print(f"{len(mutual)} pairs closer than 0.05, of which {right} are an image and its copy; {len(names)} images")
