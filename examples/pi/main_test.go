package main

import (
	"testing"
)

func TestPi(t *testing.T) {
	for n, want := range map[int]string{1: "3", 2: "3.1", 10: "3.141592653", 51: "3.14159265358979323846264338327950288419716939937510"} {
		if got := pi(n); got != want {
			t.Errorf("pi(%d) = %s, want %s", n, got, want)
		}
	}
	// The Feynman point: six nines from the 762nd decimal on.
	if got := pi(1000); got[763:769] != "999999" {
		t.Errorf("decimals 762 to 767 are %s", got[763:769])
	}
}
