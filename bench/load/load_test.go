package load

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"
)

func TestRunCountsEverything(t *testing.T) {
	r := Run(context.Background(), "x", PIDs{os.Getpid()}, 100, 7, func(_ context.Context, i int) error {
		if i%10 == 0 {
			return errors.New("tenth")
		}
		return nil
	})
	if r.Ops != 100 || r.Errors != 10 || r.First == nil || r.Memory <= 0 {
		t.Errorf("%+v", r)
	}
}

func TestPercentile(t *testing.T) {
	d := []time.Duration{3, 1, 2}
	if p := Percentile(d, 50); p != 2 {
		t.Errorf("p50 = %d", p)
	}
	if p := Percentile(d, 99); p != 3 {
		t.Errorf("p99 = %d", p)
	}
	if Percentile(nil, 50) != 0 {
		t.Error("nothing has a percentile")
	}
}

func TestParsePIDs(t *testing.T) {
	p, err := ParsePIDs("1,22")
	if err != nil || len(p) != 2 || p[1] != 22 {
		t.Errorf("%v %v", p, err)
	}
	if _, err := ParsePIDs("1,x"); err == nil {
		t.Error("x was taken for a process")
	}
}
