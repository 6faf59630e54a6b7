#!/usr/bin/env bash
echo "[%%$(hostname)%%]"
