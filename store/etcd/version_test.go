package etcd

import "testing"

func TestProgressIsSafe(t *testing.T) {
	for version, want := range map[string]bool{
		"3.4.30": false, "3.4.31": true, "3.5.12": false, "3.5.13": true, "3.5.14-rc.1": true, "3.6.0": true, "3.7.3": true, "3.3.10": false, "4.0.0": true, "odd": true,
	} {
		if got := progressIsSafe(version); got != want {
			t.Errorf("%s: %v", version, got)
		}
	}
}
