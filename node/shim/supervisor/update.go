//go:build cgo

package supervisor

import (
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"knarr/node/shim"
)

// update changes the limits of a running container. Fields that are nil stay.
func (c *container) update(r *specs.LinuxResources) error {
	if r == nil {
		return shim.Errorf(shim.CodeInvalid, "no resources given")
	}
	if c.snapshot().State != shim.StateRunning {
		return shim.Errorf(shim.CodeState, "container %s is not running", c.id)
	}
	ct, err := libcontainer.Load(c.sup.libDir, c.id)
	if err != nil {
		return err
	}
	config := ct.Config()
	cg := *config.Cgroups
	res := *cg.Resources
	merge(&res, r)
	res.SkipDevices = true
	cg.Resources = &res
	config.Cgroups = &cg
	return ct.Set(config)
}

// merge writes what is given in r into res.
func merge(res *cgroups.Resources, r *specs.LinuxResources) {
	if cpu := r.CPU; cpu != nil {
		if cpu.Shares != nil {
			res.CpuShares = *cpu.Shares
			res.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*cpu.Shares)
		}
		if cpu.Quota != nil {
			res.CpuQuota = *cpu.Quota
		}
		if cpu.Period != nil {
			res.CpuPeriod = *cpu.Period
		}
		if cpu.Cpus != "" {
			res.CpusetCpus = cpu.Cpus
		}
		if cpu.Mems != "" {
			res.CpusetMems = cpu.Mems
		}
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			res.Memory = *m.Limit
			if *m.Limit == -1 && m.Swap == nil {
				res.MemorySwap = 0 // no swap limit without a memory limit
			}
		}
		if m.Reservation != nil {
			res.MemoryReservation = *m.Reservation
		}
		if m.Swap != nil {
			res.MemorySwap = *m.Swap
		}
	}
	if r.Pids != nil {
		res.PidsLimit = r.Pids.Limit
	}
	if len(r.Unified) > 0 {
		unified := map[string]string{}
		for k, v := range res.Unified {
			unified[k] = v
		}
		for k, v := range r.Unified {
			unified[k] = v
		}
		res.Unified = unified
	}
}
