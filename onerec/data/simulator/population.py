"""Who lives in the world: users and items are drawn."""

from __future__ import annotations

import math

import numpy as np

from onerec.data.config import SimulatorConfig
from onerec.data.simulator.texts import titles
from onerec.data.simulator.world import World

# Lengths of exposed videos (s) at these shares, tab 1 of KuaiRand-Pure; the ends are ours.
_LENGTH_SHARES = (0.0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 1.0)
_LENGTHS = (5.0, 10.5, 13.2, 27.9, 76.4, 161.6, 259.2, 308.7, 480.0)


def simulate(config: SimulatorConfig) -> World:
    """Draws users and items; the log is drawn by `World.write` or `World.log`."""
    rng = np.random.default_rng([config.seed, 0])
    d, seen = config.latent_dim, config.latent_dim - config.unseen_dim
    topics = rng.standard_normal((config.n_topics, d))
    topics[:, seen:] = 0.0  # a topic says nothing of the unseen part
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)

    creator_topic = rng.integers(0, config.n_topics, config.n_creators)
    creators = 0.35 * rng.standard_normal((config.n_creators, d)) / math.sqrt(d)
    weights = rng.gamma(1.0, 1.0, config.n_creators)
    creator = rng.choice(config.n_creators, config.n_items, p=weights / weights.sum())
    stray = rng.random(config.n_items) < 0.1
    topic = np.where(
        stray, rng.integers(0, config.n_topics, config.n_items), creator_topic[creator]
    )
    items = (
        topics[topic]
        + creators[creator]
        + 0.6 * rng.standard_normal((config.n_items, d)) / math.sqrt(d)
    )
    items[:, seen:] *= 2.0
    quality = rng.standard_normal(config.n_items)
    shares = rng.permutation((np.arange(config.n_items) + 0.5) / config.n_items)
    seconds = np.interp(shares, _LENGTH_SHARES, _LENGTHS).round(1)
    popularity = np.exp(
        0.35 * quality + config.popularity_spread * rng.standard_normal(config.n_items)
    )

    # A user likes a few topics much and most a little; the rest of the taste is personal.
    liking = rng.gamma(0.15, 1.0, (config.n_users, config.n_topics))
    liking /= np.linalg.norm(liking, axis=1, keepdims=True)
    users = liking @ topics + 0.5 * rng.standard_normal((config.n_users, d)) / math.sqrt(d)
    users[:, seen:] *= 2.0
    like = np.exp(2.27 * rng.standard_normal(config.n_users))
    requests = rng.poisson(rng.gamma(3.0, config.requests_per_user / 3.0, config.n_users))

    pairs = min(200_000, 50 * config.n_items)
    raw = np.einsum(
        "pd,pd->p",
        users[rng.integers(0, config.n_users, pairs)],
        items[rng.integers(0, config.n_items, pairs)],
    )

    visible = np.concatenate(
        [
            items[:, :seen],
            0.2 * rng.standard_normal((config.n_creators, config.unseen_dim))[creator],
        ],
        axis=1,
    )
    rotation = np.linalg.qr(rng.standard_normal((config.embedding_dim, d)))[0]
    embeddings = visible @ rotation.T
    embeddings += (
        config.embedding_noise
        * visible.std()
        * rng.standard_normal(embeddings.shape)
        * math.sqrt(d / config.embedding_dim)
    )
    return World(
        config,
        {
            "user_vectors": users,
            "user_activity": rng.standard_normal(config.n_users),
            "user_patience": 0.7 * rng.standard_normal(config.n_users),
            "user_like": like / like.mean(),
            "user_requests": np.maximum(requests, 1),
            "item_vectors": items,
            "item_quality": quality,
            "item_seconds": seconds,
            "item_topic": topic.astype(np.int64),
            "item_creator": creator.astype(np.int64),
            "popularity": popularity / popularity.sum(),
            "embeddings": embeddings.astype(np.float32),
            "affinity_scale": np.array([raw.mean(), raw.std()]),
        },
        titles(topic, seconds, rng),
    )
