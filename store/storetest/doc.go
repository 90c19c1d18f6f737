// Package storetest is the one conformance suite for every engine of the store: Run checks the store's contract on an engine, with crashes;
// RunKill kills a real process with signal 9 on a real disk; Bench measures. Every random choice comes from a printed seed
// (set KNARR_SEED to repeat one).
package storetest
