"""What one worker does: world, engines, one loop, objectives, experts across ranks, checkpoints, tracking. Never imports ray."""
