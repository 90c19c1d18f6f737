package storetest

import "testing"

// Run checks an engine against the store's contract.
func Run(t *testing.T, f Factory) {
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Factory)
	}{
		{"Lifecycle", testLifecycle},
		{"Conflicts", testConflicts},
		{"BadOps", testBadOps},
		{"AllOrNothing", testAllOrNothing},
		{"Counter", testCounter},
		{"SameKeyRace", testSameKeyRace},
		{"Reopen", testReopen},
		{"Tables", testTables},
		{"Unstructured", testUnstructured},
		{"Corrupt", testCorrupt},
		{"Snapshots", testSnapshots},
		{"SnapshotWhileWriting", testSnapshotWhileWriting},
		{"SnapshotAt", testSnapshotAt},
		{"PinBounds", testPinBounds},
		{"Indexes", testIndexes},
		{"Encoding", testEncoding},
		{"EncodingBounds", testEncodingBounds},
		{"Detector", testDetector},
		{"WatchOrder", testWatchOrder},
		{"WatchFrom", testWatchFrom},
		{"WatchPrefix", testWatchPrefix},
		{"WatchGone", testWatchGone},
		{"WatchAge", testWatchAge},
		{"WatchBytes", testWatchBytes},
		{"WatchEnds", testWatchEnds},
		{"WatchReady", testWatchReady},
		{"WatchProgress", testWatchProgress},
		{"WatchMany", testWatchMany},
		{"Expiry", testExpiry},
		{"ExpiryReopen", testExpiryReopen},
		{"Busy", testBusy},
		{"WatchResumes", testWatchResumes},
		{"LossyAfterCrash", testLossyAfterCrash},
		{"RevisionsAfterCrash", testRevisionsAfterCrash},
		{"PrefixAfterCrash", testPrefixAfterCrash},
		{"Model", testModel},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, f) })
	}
}
