//go:build race

package rollout

// raceDetector makes everything many times slower.
const raceDetector = true
