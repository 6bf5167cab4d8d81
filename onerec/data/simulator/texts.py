"""Readable topics and titles for the simulated short-video world."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PLACES = (
    "Chengdu", "Lisbon", "Osaka", "Oaxaca", "Tbilisi", "Hanoi", "Marrakesh", "Naples", "Lima",
    "Istanbul", "Xi'an", "Glasgow", "Porto", "Penang", "Bogota", "Seville", "Kyoto", "Cairo",
)  # fmt: skip

# Topic -> titles; {place} is filled in.
TOPICS: dict[str, tuple[str, ...]] = {
    "cooking": ("Street food in {place}", "Noodles as in {place}", "Knife skills for beginners",
                "One-pan dinner", "Bread without kneading", "A grandmother's recipe from {place}"),
    "travel": ("48 hours in {place}", "Night train to {place}", "Hidden courtyards of {place}",
               "Packing light", "A cheap week in {place}", "Old town of {place} at dawn"),
    "football": ("Free kick from 30 metres", "Street football in {place}", "Best saves of the week",
                 "Dribbling drill", "Derby day in {place}", "A coach explains pressing"),
    "basketball": ("Crossover in slow motion", "Pickup game in {place}", "Buzzer beaters",
                   "Shooting form fixed", "Handles workout", "Court tour of {place}"),
    "fitness": ("Ten-minute core", "Morning run through {place}", "Pull-ups from zero",
                "Stretching for desk workers", "Kettlebell basics", "Outdoor gym in {place}"),
    "gaming": ("Boss fight without damage", "Speedrun explained", "Cosy farm tour",
               "Arcade night in {place}", "Five tricks nobody uses", "Last circle clutch"),
    "music": ("Street pianist in {place}", "Guitar riff in a minute", "Choir in a stairwell",
              "Beat made from kitchen sounds", "Busking in {place}", "Cover with one hand"),
    "dance": ("Rooftop dance in {place}", "Footwork step by step", "Wedding dance surprise",
              "Popping basics", "Folk dance of {place}", "Rehearsal against the mirror"),
    "comedy": ("When the group chat goes silent", "Tourists in {place}", "Office bingo",
               "My mother on the phone", "Stand-up set in {place}", "Every landlord ever"),
    "cats": ("Cat versus cucumber", "Harbour cats of {place}", "Kitten meets mirror",
             "Three a.m. zoomies", "Shop cat in {place}", "Cat judges dinner"),
    "dogs": ("Puppy's first snow", "Recall training", "Dog rides the tram in {place}",
             "Rescue dog, day one", "Dog park in {place}", "Grooming a giant"),
    "cars": ("Engine swap, part two", "Night drive in {place}", "Detailing a ruin",
             "Old van, new life", "Car meet in {place}", "Parallel parking solved"),
    "gadgets": ("Phone repaired with a coin", "Electronics market in {place}", "Pocket projector",
                "Keyboard sound test", "Battery myths", "A desk without cables"),
    "fashion": ("Thrift haul in {place}", "One shirt, five looks", "Mending a jumper",
                "Street style in {place}", "Capsule wardrobe", "How shoes are resoled"),
    "make-up": ("Soft evening look", "Skin care order", "Stage make-up in {place}",
                "Drugstore only", "Hair in four minutes", "Market finds in {place}"),
    "home": ("Tiny flat in {place}", "Shelf without drilling", "Tiles by hand",
             "Sunday reset", "Balcony in {place}", "Paint a door properly"),
    "gardening": ("Tomatoes on a balcony", "Bonsai garden in {place}", "Saving a dying fern",
                  "Compost in a bucket", "Rooftop garden in {place}", "Pruning roses"),
    "family": ("Twins discover echo", "Lunch box ideas", "Playground tour of {place}",
               "Bedtime in real time", "Science with toddlers", "Grandpa visits {place}"),
    "science": ("Magnet through copper", "Why the sky turns green", "Observatory in {place}",
                "Ice that burns", "Slime mould maze", "Physics of a spinning coin"),
    "history": ("A wall older than {place}", "Letters from 1914", "How maps lied",
                "The bridge of {place}", "A coin's long trip", "Lost subway of {place}"),
    "film": ("One shot explained", "Cinemas of {place}", "Practical effects, ranked",
             "Ending you missed", "Sound design demo", "Film locations in {place}"),
    "painting": ("Watercolour of {place}", "Portrait in ten strokes", "Mixing a true green",
                 "Mural in {place}", "Sketchbook tour", "Ink and one brush"),
    "fishing": ("Dawn on the river", "Harbour morning in {place}", "Knots that hold",
                "Carp, caught and released", "Night fishing near {place}", "Lures from scrap"),
    "farming": ("Lambing season", "Rice terraces near {place}", "Tractor stuck again",
                "Beekeeping, first year", "Market day in {place}", "Milking at five"),
}  # fmt: skip


def titles(
    topic: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64], rng: np.random.Generator
) -> list[str]:
    """One readable line an item, e.g. "Street food in Chengdu · cooking · 34 s"."""
    names = list(TOPICS)
    title = rng.integers(0, 1 << 30, len(topic))
    place = rng.integers(0, len(PLACES), len(topic))
    out = []
    for k, i, j, length in zip(topic, title, place, seconds, strict=True):
        lines = TOPICS[names[k]]
        line = lines[i % len(lines)].format(place=PLACES[j])
        out.append(f"{line} · {names[k]} · {length:.0f} s")
    return out
