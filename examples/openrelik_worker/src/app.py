"""The Celery application; ``REDIS_URL`` says where OpenRelik's broker is."""

import os

from celery import Celery

REDIS_URL = os.getenv("REDIS_URL", "redis://localhost:6379/0")
celery = Celery(broker=REDIS_URL, backend=REDIS_URL, include=["src.tasks"])
